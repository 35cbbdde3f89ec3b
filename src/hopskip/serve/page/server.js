// Requests to the server, and the answers it streams.

import { live } from "./state.js";

const KEY = "hopskip.key";
try { live.key = sessionStorage.getItem(KEY); } catch { /* forbidden: asked for in every visit */ }

// What the server, or the way to it, has against a request. `status` is 0 if nothing came back.
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  live.key = key;
  try { sessionStorage.setItem(KEY, key); } catch { /* see above */ }
}

export async function fetchCard() {
  const answer = await ask("v1/models");
  return (await answer.json()).data[0];
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  // with a key of ours, a browser has no reason to ask for a password
  if (live.key) headers.Authorization = `Bearer ${live.key}`;
  let answer;
  try { answer = await fetch(path, { ...options, headers, credentials: live.key ? "omit" : "same-origin" }); }
  catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it running?");
  }
  if (answer.ok) return answer;
  const failure = await answer.json().catch(() => null);
  const reason = failure && failure.error ? failure.error.message : `it answers ${answer.status}`;
  throw new ServerError(answer.status === 503 ? `The server is not ready: ${reason}. Try again in a moment.` : `The server could not answer: ${reason}`, answer.status);
}

async function* events({ path, body }, signal) {
  const answer = await ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new ServerError("The connection was lost before the answer ended.");
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      if (event === "data: [DONE]") return;
      if (!event.startsWith("data: ")) continue;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new ServerError(`The server could not finish: ${chunk.error.message}`, 500);
      yield chunk;
    }
  }
}

export const newLane = () => ({ text: "", tokens: [], stats: null, race: null, rate: 0, finish: null });

// One request. Its choices grow the lanes of these numbers; `show` is called with what each has got.
export async function generate(request, lanes, signal, show) {
  for await (const chunk of events(request, signal)) {
    for (const choice of chunk.choices) {
      const lane = lanes[choice.index], extra = choice.hopskip;
      if (choice.finish_reason) lane.finish = choice.finish_reason;
      if (!extra) continue;
      const fresh = extra.tokens.map((t) => ({ t: t.text, k: t.token, o: t.origin, l: t.layer, p: t.logprob, top: t.top.map((a) => [a.token, a.logprob]) }));
      lane.tokens.push(...fresh);
      lane.text += fresh.map((t) => t.t).join("");
      lane.stats = extra.stats;
      lane.race = extra.race || null;
      // in a race the seconds of the statistics are those of both
      lane.rate = !lane.race ? extra.stats.decode_tokens_per_second : lane.race.seconds ? lane.race.num_tokens / lane.race.seconds : 0;
      show(lane, fresh);
    }
  }
}
