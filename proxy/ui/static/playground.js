// The playground: sends a request to the public endpoint through the dashboard, and shows the stream as it comes.
(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const number = new Intl.NumberFormat();
  const { Episode, make, csrf } = window.autotts;
  const settings = JSON.parse(byId("settings").textContent);
  let running = null;

  const request = () => {
    const tts = { beta: Number(byId("beta").value) };
    if (byId("controller").value) tts.controller = byId("controller").value;
    if (byId("kind").value !== "auto") tts.answer = byId("kind").value;
    if (byId("cap").value) tts.max_total_tokens = Number(byId("cap").value);
    return { model: byId("model").value, messages: [{ role: "user", content: byId("question").value }], tts };
  };

  const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const python = (value) =>
    JSON.stringify(value, null, 1).replace(/\n\s*/g, " ").replaceAll(": true", ": True").replaceAll("{ ", "{").replaceAll(" }", "}").replaceAll("[ ", "[").replaceAll(" ]", "]");

  const showRequest = () => {
    const { tts, ...body } = request();
    const url = `${location.origin}/v1`;
    const key = settings.needsKey ? " \\\n  -H \"authorization: Bearer $AUTOTTS_API_KEY\"" : "";
    byId("curl").textContent =
      `curl ${url}/chat/completions -H 'content-type: application/json'${key} \\\n  -d ${shellQuoted(JSON.stringify({ ...body, tts }, null, 2))}`;
    byId("python").textContent = [
      ...(settings.needsKey ? ["import os", ""] : []),
      "from openai import OpenAI",
      "",
      `client = OpenAI(base_url="${url}", api_key=${settings.needsKey ? 'os.environ["AUTOTTS_API_KEY"]' : '"unused"'})`,
      "reply = client.chat.completions.create(",
      `    model=${JSON.stringify(body.model)},`,
      `    messages=[{"role": "user", "content": ${JSON.stringify(body.messages[0].content)}}],`,
      `    extra_body={"tts": ${python(tts)}},`,
      ")",
      "print(reply.choices[0].message.content, reply.usage.total_tokens)",
    ].join("\n");
  };

  // Interpolates linearly between the calibrated or observed points.
  const tokensAt = (points, beta) => {
    const after = points.findIndex(([at]) => at >= beta);
    if (after === -1) return points.at(-1)[1];
    if (after === 0 || points[after][0] === beta) return points[after][1];
    const [[x0, y0], [x1, y1]] = [points[after - 1], points[after]];
    return y0 + ((beta - x0) / (x1 - x0)) * (y1 - y0);
  };
  const showCost = () => {
    const beta = Number(byId("beta").value);
    byId("beta-value").textContent = beta.toFixed(2);
    const costs = settings.costs[byId("model").value];
    const name = byId("controller").value || costs?.default;
    const points = costs?.points[name];
    byId("cost").textContent = points?.length
      ? `About ${number.format(Math.round(tokensAt(points, beta)))} tokens on average on this model (${costs.source}).`
      : "0 is one branch, 1 is the most that the controller spends. What it costs on this model is not known yet: calibrate, or ask a few questions.";
  };

  const setRunning = (controller) => {
    running = controller;
    byId("start").disabled = controller !== null;
    byId("stop").disabled = controller === null;
  };
  const fail = (message) => {
    byId("problem").textContent = message;
    byId("problem").hidden = false;
    byId("status").textContent = "";
  };

  const addToBill = (kind, meaning, tokens) => {
    const row = make("tr");
    const name = make("th", "", kind);
    name.scope = "row";
    row.append(name, make("td", "", meaning), make("td", "number", number.format(tokens)));
    byId("bill").append(row);
  };
  // The server has the words, which are those of `autotts trace show`.
  const explain = async (tts, finished) => {
    const { controller, beta, rounds, branches, stop, answer, votes, agreement, confidence, selected_by, fallback, escalated_beta } = tts;
    const known = { controller, beta, rounds, branches, finished, stop, answer, votes, agreement, confidence, selected_by, fallback, escalated_beta };
    try {
      const response = await fetch("/ui/data/playground/end", {
        method: "POST",
        headers: { "x-csrf-token": csrf() },
        body: new URLSearchParams({ episode: JSON.stringify(known) }),
      });
      const said = await response.json();
      byId("why").textContent = response.ok ? said.why : said.error.message;
    } catch (error) {
      byId("why").textContent = `It stopped: ${stop}. The proxy could not be asked why: ${error.message}`;
    }
  };
  const finish = (tts, id, content, thought, episode) => {
    byId("status").textContent = "Done.";
    byId("result").hidden = false;
    byId("answer").textContent = content || "(no text)";
    byId("thought").textContent = thought;
    byId("thought-box").hidden = !thought;
    byId("bill").replaceChildren();
    byId("why").textContent = "";
    if (!tts || !tts.applied) {
      byId("why").textContent = `No controller served this request (${tts?.reason ?? "no reason given"}); it was passed through.`;
      return;
    }
    void explain(tts, episode.finished);
    const { total, ...spent } = tts.tokens;
    for (const [kind, tokens] of Object.entries(spent)) if (tokens) addToBill(kind, settings.kinds[kind] ?? "", tokens);
    addToBill("total", "everything above", total);
    byId("more").replaceChildren();
    if (settings.isRecorded) {
      const link = make("a", "", "See this request in full");
      link.href = `/ui/requests/${encodeURIComponent(id)}`;
      byId("more").append(link);
    }
  };

  const read = async (response, episode) => {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", content = "", thought = "", id = "", tts = null, isDone = false;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
        if (!data) continue;
        if (data === "[DONE]") {
          isDone = true;
          continue;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        id = chunk.id ?? id;
        if (chunk.tts?.progress) {
          episode.add(chunk.tts.progress);
          byId("live").hidden = false;
          const { round, branches, tokens, votes } = chunk.tts.progress;
          const leader = votes.length ? `, ${votes[0].answer} leads` : "";
          byId("status").textContent = `Round ${round}: ${branches} branches${leader}, ${number.format(tokens)} tokens.`;
          continue;
        }
        if (chunk.tts) tts = chunk.tts;
        const delta = chunk.choices?.[0]?.delta ?? {};
        content += delta.content ?? "";
        thought += delta.reasoning ?? "";
      }
    }
    if (!isDone) throw new Error("the stream ended early; the log of the proxy has the reason");
    finish(tts, id, content, thought, episode);
  };

  byId("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    const abort = new AbortController();
    setRunning(abort);
    for (const id of ["problem", "result", "live"]) byId(id).hidden = true;
    byId("status").textContent = "Waiting for the first round…";
    const episode = new Episode(byId("branches"), byId("votes"), byId("facts"));
    const body = request();
    body.stream = true;
    body.tts.progress = "rounds";
    try {
      const response = await fetch("/ui/data/playground", {
        method: "POST",
        headers: { "content-type": "application/json", "x-csrf-token": csrf() },
        body: JSON.stringify(body),
        signal: abort.signal,
      });
      if (response.status === 401) location.assign("/ui/sign-in?next=/ui/playground");
      if (!response.ok) throw new Error((await response.json()).error.message);
      await read(response, episode);
    } catch (error) {
      if (error.name === "AbortError") byId("status").textContent = "Stopped. The tokens so far are billed.";
      else fail(error.message);
    } finally {
      setRunning(null);
    }
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
  });
  const update = () => {
    showCost();
    showRequest();
  };
  byId("ask").addEventListener("input", update);
  update();
})();
