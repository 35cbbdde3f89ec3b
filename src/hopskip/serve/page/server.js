// Requests to the server, and the answers it streams.

import { canChooseExit, live, state } from "./state.js";

function body(messages, plain) {
  const s = state.settings, own = live.card.hopskip;
  const request = { model: live.card.id, stream: true, return_tokens: true, stream_options: { include_usage: true },
    temperature: s.temperature, max_tokens: s.max };
  if (plain || !s.enabled) { if (own.draft !== "none") request.speculative = { enabled: false }; }
  else if (own.draft !== "none") {
    request.speculative = { num_draft_tokens: s.k };
    if (canChooseExit()) request.speculative.exit_layer = s.exit;
  }
  if (own.has_chat_template) return { ...request, messages: s.system ? [{ role: "system", content: s.system }, ...messages] : messages };
  return { ...request, prompt: messages[messages.length - 1].content };
}

async function* stream(request, signal) {
  const path = live.card.hopskip.has_chat_template ? "v1/chat/completions" : "v1/completions";
  const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request), signal });
  if (!answer.ok) {
    const failure = await answer.json().catch(() => null);
    throw new Error(failure && failure.error ? failure.error.message : `the server answers ${answer.status}`);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const line of events) {
      if (line === "data: [DONE]") return;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// One generation into `lane`, an object with tokens, stats and seconds; `show` is called with what is new.
export async function generate(lane, messages, plain, signal, show) {
  lane.tokens = []; lane.stats = null; lane.rate = 0; lane.finish = null;
  let first = 0, count = 0;
  for await (const chunk of stream(body(messages, plain), signal)) {
    const choice = chunk.choices[0];
    if (!choice) continue;
    const extra = choice.hopskip || { tokens: [] };
    const now = performance.now();
    const fresh = extra.tokens.map((t) => ({ t: t.text, k: t.token, o: t.origin, l: t.layer, p: t.logprob, top: t.top.map((a) => [a.token, a.logprob]) }));
    lane.tokens.push(...fresh);
    if (extra.stats) lane.stats = extra.stats;
    count += fresh.length;
    if (!first && count) first = now;
    if (count > 1 && now > first) lane.rate = (count - 1) / (now - first) * 1000;
    if (choice.finish_reason) lane.finish = choice.finish_reason;
    show(fresh, choice.finish_reason);
  }
  if (lane.stats && lane.stats.decode_tokens_per_second) lane.rate = lane.stats.decode_tokens_per_second;
}
