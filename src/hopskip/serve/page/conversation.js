// The conversation: questions, answers as they come, and what stands below them.

import { showFigures } from "./figures.js";
import { generate } from "./server.js";
import { $, el, live, percent, save, state } from "./state.js";
import { append, hideTip } from "./tokens.js";

const SVG = "http://www.w3.org/2000/svg";
const IDEAS = [
  ["Rewrite something", "copies are drafted from the prompt", "Rewrite this in the past tense, changing nothing else: The fox jumps over the dog. The dog sleeps in the sun. The sun shines on the fox and the dog all day."],
  ["Count", "patterns are easy to draft", "Count from 1 to 40, one number on each line."],
  ["Explain", "new text: mostly the model itself", "Explain in a few sentences why the sky is blue."],
  ["Write code", "somewhere in between", "Write a Python class for a stack with push, pop, peek and a length, with docstrings."],
];

export async function ask(text) {
  state.turns.push({ role: "user", text });
  await answerLast();
}

async function answerLast() {
  const messages = state.turns.filter((t) => !t.error || t.text).map((t) => ({ role: t.role, content: t.text }));
  const turn = { role: "assistant", text: "", tokens: [], stats: null };
  state.turns.push(turn);
  const abort = new AbortController();
  live.running = { abort, turn };
  live.rates = [];
  draw();
  const node = $("log").lastElementChild;
  const view = node.querySelector(".answer");
  node.classList.add("running");
  showButtons();
  try {
    await generate(turn, messages, false, abort.signal, (fresh) => {
      turn.text += fresh.map((t) => t.t).join("");
      append(view, fresh);
      if (turn.rate) live.rates.push(turn.rate);
      showFigures(turn);
      follow();
    });
    node.classList.remove("running");
    if (state.settings.race && live.card.hopskip.draft !== "none" && state.settings.enabled) await race(turn, messages, abort.signal, node);
  } catch (error) {
    if (error.name === "AbortError") turn.stopped = true;
    else turn.error = error instanceof TypeError ? "The server cannot be reached. Is it running?" : `The server could not answer: ${error.message}`;
  }
  live.running = null;
  save();
  draw();
  showFigures(turn);
  showButtons();
  $("input").focus();
}

async function race(turn, messages, signal, node) {
  turn.plain = { text: "" };
  fillAnswer(node, turn);
  const lane = node.querySelector(".lane-plain");
  lane.classList.add("running");
  const view = lane.querySelector(".answer");
  await generate(turn.plain, messages, true, signal, (fresh) => {
    turn.plain.text += fresh.map((t) => t.t).join("");
    append(view, fresh);
    showFigures(turn);
    follow();
  });
}

function follow() {
  const log = $("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 160) log.scrollTop = log.scrollHeight;
}

export function draw() {
  hideTip();
  const log = $("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 160;
  log.replaceChildren();
  if (!state.turns.length) drawEmpty(log);
  state.turns.forEach((turn, index) => {
    const node = el("article", `turn ${turn.role}`);
    if (turn.role === "user") node.append(el("div", "text", turn.text));
    else fillAnswer(node, turn, index === state.turns.length - 1);
    log.append(node);
  });
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function drawEmpty(log) {
  const empty = el("div", "empty");
  empty.append(el("h2", "", "See who wrote every token"), el("p", "", "The first layers draft, all layers verify. The text is exactly what the whole model would have written, only sooner."));
  const ideas = el("div", "ideas");
  for (const [title, note, prompt] of IDEAS) {
    const button = el("button");
    button.append(el("b", "", title), el("span", "", note));
    button.onclick = () => { if (!live.running && live.card) ask(prompt); };
    ideas.append(button);
  }
  empty.append(ideas);
  log.append(empty);
}

function fillAnswer(node, turn, isLast) {
  node.replaceChildren();
  const lanes = el("div", turn.plain ? "lanes" : "");
  lanes.append(lane(turn, "speculative", "", turn.plain), ...(turn.plain ? [lane(turn.plain, "plain", "lane-plain", true)] : []));
  node.append(lanes);
  if (turn.error) {
    const box = el("div", "error", turn.error);
    box.setAttribute("role", "alert");
    node.append(box);
  }
  if (live.running && live.running.turn === turn) return;
  const under = el("div", "under");
  if (isLast) under.append(action("Regenerate", "M4 12a8 8 0 0 1 14-5l2 2M20 4v5h-5M20 12a8 8 0 0 1-14 5l-2-2M4 20v-5h5", regenerate));
  if (turn.text) under.append(action("Copy", "M9 9h10v10H9zM5 15V5h10", () => navigator.clipboard.writeText(turn.text)));
  if (turn.stats || turn.stopped) under.append(el("span", "facts", facts(turn)));
  node.append(under);
}

function lane(data, name, className, isNamed) {
  const node = el("div", className);
  if (isNamed) {
    const who = el("div", "who", name);
    if (data.rate) who.append(el("span", "", `${data.rate.toFixed(0)} tokens/s`));
    node.append(who);
  }
  const view = el("div", "answer");
  view.tabIndex = 0;
  view.setAttribute("aria-label", `Answer, ${name}`);
  append(view, data.tokens || []);
  node.append(view);
  return node;
}

function facts(turn) {
  const s = turn.stats, parts = [];
  if (turn.stopped) parts.push("stopped");
  if (s) parts.push(`${s.num_tokens} tokens`, `${turn.rate.toFixed(0)} tokens/s`);
  if (s && s.num_drafts) parts.push(`${percent(s.acceptance_rate)} of drafts accepted`);
  if (turn.finish === "length") parts.push("cut at the limit");
  return parts.join(", ");
}

function action(name, path, run) {
  const button = el("button", "quiet");
  // not from markup: the policy of the page lets no text become elements
  const svg = document.createElementNS(SVG, "svg"), line = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  line.setAttribute("d", path);
  svg.append(line);
  button.append(svg, ` ${name}`);
  button.onclick = run;
  return button;
}

async function regenerate() {
  if (live.running || !live.card) return;
  state.turns.pop();
  await answerLast();
}

export function showButtons() {
  $("send").textContent = live.running ? "Stop" : "Send";
  $("send").classList.toggle("stop", Boolean(live.running));
  $("send").disabled = !live.running && (!live.card || !$("input").value.trim());
}
