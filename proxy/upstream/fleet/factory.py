"""Create the upstream that the settings name: the client of one server, or of a fleet."""

from __future__ import annotations

from collections.abc import Callable

import aiohttp

from proxy.settings import Settings, parse_upstreams
from proxy.telemetry.metrics import Metrics
from proxy.upstream.branch_semaphore import BranchSemaphore
from proxy.upstream.client import UpstreamClient
from proxy.upstream.fleet.dns_poller import DnsPoller
from proxy.upstream.fleet.fleet import Fleet
from proxy.upstream.fleet.fleet_client import FleetClient
from proxy.upstream.fleet.interface import Upstream
from proxy.upstream.fleet.replica import Replica
from proxy.upstream_observer import UpstreamObserver


def create_upstream(
    settings: Settings,
    session: aiohttp.ClientSession,
    metrics: Metrics,
    observer: UpstreamObserver | None = None,
    on_event: Callable[[str], object] = lambda _: None,
) -> Upstream:
    """Return the upstream that `settings` name. `on_event` is called as by `UpstreamClient`."""
    observer = observer or UpstreamObserver()

    def client(url: str) -> UpstreamClient:
        return UpstreamClient(
            url,
            session,
            read_timeout_s=settings.read_timeout_s,
            branch_semaphore=BranchSemaphore(settings.branches_in_flight),
            observer=observer,
            on_event=on_event,
            session_header=settings.session_header,
        )

    upstreams = parse_upstreams(str(settings.upstream))
    if upstreams.is_single:
        return client(upstreams.addresses[0].url)
    if upstreams.is_dns:
        fleet = Fleet([], settings.spill_load, metrics)
        poller = DnsPoller(upstreams.addresses[0].url, settings.dns_poll_s, fleet, lambda url: Replica(client(url)))
        return FleetClient(fleet, observer, settings.read_timeout_s, poller)
    replicas = [Replica(client(address.url), address.models) for address in upstreams.addresses]
    return FleetClient(Fleet(replicas, settings.spill_load, metrics), observer, settings.read_timeout_s)
