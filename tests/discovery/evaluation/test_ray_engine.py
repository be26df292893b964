"""Evaluation on Ray: a real cluster of two workers gives the figures of this process, also if a worker is killed."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from controllers.loading import Spec, parse_spec
from discovery.data.importers import format_recording_line
from discovery.data.recordings import intern_answers
from discovery.errors import EngineError, TraceError
from discovery.evaluation import engines
from discovery.evaluation.engines import EngineName, RayJobPool, RaySubmit, make_engine
from discovery.evaluation.evaluate import Evaluation
from discovery.evaluation.replay_jobs import ReplayRules, Sealing, make_jobs
from discovery.evaluation.scores import Score, paired_differences
from discovery.ray_cluster import ray_connection, socket_folder
from proxy.cli import app
from proxy.upstream.embedded import free_port
from tests.discovery.evaluation.test_evaluate import CELL, SOURCE, columns, without_time
from tests.ray_cluster import need_ray

RECORDINGS = [intern_answers(recorded) for recorded in SOURCE.load(CELL)]
pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.xdist_group("ray")]


def evaluated(*specs: Spec, address: str | None, rules: ReplayRules) -> list[Score]:
    """Score controllers on the cluster at `address`, or in this process without one."""
    engine = EngineName.LOCAL if address is None else EngineName.RAY
    evaluation = Evaluation(SOURCE, SOURCE.cells(), specs, [0.0, 1.0], 25, rules=rules)
    return evaluation.run(make_engine(engine, address=address))


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_cluster_gives_the_scores_and_traces_of_this_process(ray_cluster: str, tmp_path: Path) -> None:
    specs = [parse_spec(name) for name in ("cmc", "self_consistency@8", "parallel_probe")]
    here = evaluated(*specs, address=None, rules=ReplayRules(16, traces=tmp_path / "here"))
    there = evaluated(*specs, address=ray_cluster, rules=ReplayRules(16, traces=tmp_path / "there"))
    assert [without_time(score) for score in there] == [without_time(score) for score in here]
    assert columns(there) == columns(here)
    assert paired_differences(there) == paired_differences(here)
    assert len(files(tmp_path / "here")) == 3 * 2 * 2 * 3  # controllers, β, cells, jobs
    assert files(tmp_path / "there") == files(tmp_path / "here")


def test_a_killed_worker_loses_no_result(ray_cluster: str, tmp_path: Path) -> None:
    """A controller kills the worker it runs in with SIGKILL, once, after some episodes of a job."""
    marker = tmp_path / "killed"
    source = f"""
import os, signal
from controllers import TO_END, answer, branch
class Mine:
    played = 0
    def __init__(self, beta): self.width = 1 + round(7 * beta)
    def decide(self, state):
        if state.width: return [answer(state.leader())]
        Mine.played += 1
        if Mine.played == 40 and not os.path.exists({str(marker)!r}):
            open({str(marker)!r}, "w").write(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return [branch(TO_END)] * self.width
"""
    rules = ReplayRules(16, sealing=Sealing.NONE)
    there = evaluated(Spec("mine", source), parse_spec("cmc"), address=ray_cluster, rules=rules)
    assert int(marker.read_text()) != os.getpid()
    here = evaluated(Spec("mine", source), parse_spec("cmc"), address=None, rules=rules)
    assert [without_time(score) for score in there] == [without_time(score) for score in here]
    assert columns(there) == columns(here)


def test_the_command_uses_a_cluster_of_ray_start_that_demands_a_token(tmp_path: Path) -> None:
    need_ray()
    recordings, token = tmp_path / "recorded.jsonl", tmp_path / ".ray" / "auth_token"
    recordings.write_text("".join(format_recording_line(recorded) for recorded in SOURCE.recordings))
    token.parent.mkdir()
    token.write_text(32 * "ab")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", dir=socket_folder(), ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        environment |= {"HOME": str(tmp_path), "RAY_TMPDIR": folder}
        start = ("start", "--head", "--block", "--port", str(port), "--num-cpus", "1", "--include-dashboard", "false")
        with subprocess.Popen(
            [Path(sys.executable).with_name("ray"), *start], env=environment, stdout=subprocess.PIPE, text=True
        ) as head:
            try:
                assert head.stdout is not None
                assert any("Ray runtime started" in line for line in head.stdout)
                about = ("--controllers", "cmc", "--shuffles", "3", "--json", "-")
                figures = []
                for engine in (("local",), ("ray", "--address", f"127.0.0.1:{port}")):
                    command = ("evaluate", "--recordings", str(recordings), *about, "--engine", *engine)
                    done = subprocess.run(
                        [sys.executable, "-m", "proxy.cli", *command],
                        env=environment,
                        capture_output=True,
                        text=True,
                        timeout=60,
                        check=False,
                    )
                    assert done.returncode == 0, done.stderr
                    figures.append(json.loads(done.stdout))
            finally:
                head.terminate()
                head.communicate()
    for score in itertools.chain(*figures):
        del score["seconds"], score["decisions_per_s"]
    assert figures[0] == figures[1] != []


def test_a_job_that_kills_every_worker_is_an_engine_error(ray_cluster: str) -> None:
    source = "import os, signal\nclass Mine:\n    def __init__(self, beta): os.kill(os.getpid(), signal.SIGKILL)\n"
    source += "    def decide(self, state): return []\n"
    with RayJobPool(ray_cluster) as pool:
        submit = pool.share(RECORDINGS)
        (job,) = make_jobs([Spec("mine", source)], [1.0], CELL, 1)
        with pytest.raises(EngineError, match="Ray lost a task 4 times"):
            submit(job, ReplayRules(16, sealing=Sealing.NONE), 1).result()


def test_recordings_are_put_into_the_store_once_and_workers_map_them(ray_cluster: str) -> None:
    import ray

    with RayJobPool(ray_cluster) as pool:
        assert pool.workers == 2
        submit = pool.share(RECORDINGS)
        assert isinstance(submit, RaySubmit)
        for job in make_jobs([Spec("cmc")], [1.0], CELL, 40):
            submit(job, ReplayRules(16), 1).result()

        @ray.remote  # type: ignore[untyped-decorator]
        def is_mapped(shared: list[object]) -> bool:
            arrays = [value for value in vars(ray.get(shared[0])[0]).values() if hasattr(value, "flags")]
            return bool(arrays) and not any(array.flags.owndata or array.flags.writeable for array in arrays)

        assert ray.get(is_mapped.remote([submit.reference]))


def test_errors_of_jobs_arrive_unchanged(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TraceError, match=r"file/.*: Not a directory"):
        evaluated(parse_spec("cmc"), address=ray_cluster, rules=ReplayRules(16, traces=tmp_path / "file"))


def test_workers_with_other_code_are_an_error(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.ray_jobs, "code_digest", lambda: "other")
    with pytest.raises(EngineError, match=r"the code of autotts-proxy on Ray's node .* differs"):
        evaluated(parse_spec("cmc"), address=ray_cluster, rules=ReplayRules(16))


def test_messages_of_ray_are_logged_and_not_mixed_with_figures_on_standard_output(
    ray_cluster: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with ray_connection(ray_cluster, 1):
        from ray._private import worker

        worker.print_to_stdstream(
            {"lines": ["A worker died. It was 7."], "pid": "raylet", "is_err": False}, ignore_prefix=False
        )
    assert caplog.messages == ["Ray: A worker died"]
    assert capsys.readouterr().out == ""


def test_a_local_cluster_listens_on_this_machine_only_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    need_ray()
    made: list[str] = []
    make = tempfile.TemporaryDirectory

    def remember(**options: object) -> object:
        folder = make(**options)  # type: ignore[call-overload]
        made.append(folder.name)
        return folder

    monkeypatch.setattr(tempfile, "TemporaryDirectory", remember)
    with ray_connection(None, 1) as processors:
        assert processors == 1
        (folder,) = made
        processes = processes_in(folder)
        assert {"gcs_server", "raylet"} <= {Path(command.split()[0]).name for command in processes.values()}
        assert addresses_of(processes) == {"127.0.0.1"}
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not Path(folder).exists()
    assert processes_in(folder) == {}


def processes_in(folder: str) -> dict[int, str]:
    """Return the commands of processes that name a folder, by process id."""
    commands = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has ended
            continue
        if folder in command:
            commands[int(path.parent.name)] = command
    return commands


def addresses_of(processes: dict[int, str]) -> set[str]:
    """Return the addresses that processes listen on."""
    sockets = {
        target.group(1)
        for process in processes
        for link in Path(f"/proc/{process}/fd").iterdir()
        if (target := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link)))
    }
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[at] for at in (1, 3, 9))
            if state == "0A" and inode in sockets:
                address = bytes.fromhex(local.partition(":")[0])[-4:]  # IPv6 ones map IPv4 ones
                found.add(socket.inet_ntoa(address[::-1] if sys.byteorder == "little" else address))
    return found


def test_a_command_without_ray_as_its_engine_refuses_an_address() -> None:
    about = ["evaluate", "--recordings", "none.db", "--address", "127.0.0.1:6379"]
    for more, message in (([], "only --engine ray"), (["--engine", "ray", "--workers", "2"], "leave --workers out")):
        refused = CliRunner().invoke(app, [*about, *more], env={"COLUMNS": "200"})
        assert refused.exit_code == 2
        assert message in refused.output


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("head:port", "--address head:port: not HOST:PORT"),
        ("127.0.0.1", "--address 127.0.0.1: not HOST:PORT"),
        ("127.0.0.1:1", "no Ray cluster answers there \\(Connection refused\\); start one with `ray start --head`"),
    ],
)
def test_an_address_without_a_cluster_is_refused(address: str, message: str) -> None:
    need_ray()
    with pytest.raises(EngineError, match=message), ray_connection(address, 1):
        pass


def test_a_temporary_folder_that_is_too_long_is_replaced_by_the_one_that_ray_chooses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + 23 * "x")
    assert socket_folder() == "/tmp"
    monkeypatch.setattr("discovery.ray_cluster.RAYS_OWN", str(tmp_path / "away"))
    with pytest.raises(EngineError, match="too long for the sockets of Ray; set it to a folder of at most 23 bytes"):
        socket_folder()


def test_ray_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=re.escape("--engine ray needs Ray: pip install '.[ray]' in a checkout")):
        evaluated(parse_spec("cmc"), address="127.0.0.1:1", rules=ReplayRules(16))
