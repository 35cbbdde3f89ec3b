// One turn of a conversation as elements: a question, or an answer with what stands below it.

import { timesPlain, timesText } from "./figures.js";
import { MarkdownView } from "./markdown.js";
import { copyText, el, iconButton, live, percent, settings } from "./state.js";
import { append } from "./tokens.js";

const RETRY = "M4 12a8 8 0 0 1 14-5l2 2M20 4v5h-5M20 12a8 8 0 0 1-14 5l-2-2M4 20v-5h5", COPY = "M9 9h10v10H9zM5 15V5h10", EDIT = "M4 20h4L19 9l-4-4L4 16zM13 7l4 4";
const THOUGHT = /^\s*<think>\n*([\s\S]*?)(?:<\/think>\s*|$)/;  // what a reasoning model writes before its answer

export function questionNode(turn, edit) {
  const node = el("article", "turn user"), text = el("div", "text", turn.text);
  node.setAttribute("aria-label", "Question");
  text.dir = "auto";
  node.append(iconButton("quiet edit", EDIT, "Edit this question, and ask again from here", edit), text);
  return node;
}

// In place of a question: a form that changes it. `done` is called with the new text, or null.
export function editNode(turn, done) {
  const node = el("article", "turn user"), form = el("form", "editing"), area = el("textarea"), row = el("div");
  const send = el("button", "send", "Ask again"), cancel = el("button", "quiet", "Cancel");
  area.value = turn.text;
  area.dir = "auto";
  area.rows = Math.min(12, turn.text.split("\n").length + 1);
  area.setAttribute("aria-label", "Edit the question; what follows it is replaced");
  cancel.type = "button";
  cancel.onclick = () => done(null);
  form.onsubmit = (event) => { event.preventDefault(); if (area.value.trim()) done(area.value.trim()); };
  area.onkeydown = (event) => {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
    if (event.key === "Escape") { event.stopPropagation(); done(null); }
  };
  row.append(cancel, send);
  form.append(area, row);
  node.append(form);
  return node;
}

// An answer's element. While the answer comes, `grow(lane, fresh)` shows what is new.
export function answerNode(turn, isLast, retry) {
  const node = el("article", "turn assistant"), isRunning = live.running !== null && live.running.turn === turn;
  node.setAttribute("aria-label", "Answer");
  node.classList.toggle("running", isRunning);
  const lanes = el("div", turn.plain ? "lanes" : "");
  const views = new Map([[turn, laneView(turn, turn.plain ? "drafted" : "", isRunning)]]);
  if (turn.plain) views.set(turn.plain, laneView(turn.plain, "plain", isRunning));
  lanes.append(...[...views.values()].map((view) => view.node));
  node.append(lanes);
  node.grow = (lane, fresh) => views.get(lane).grow(fresh);
  if (turn.error) {
    const box = el("div", "error", turn.error);
    box.setAttribute("role", "alert");
    node.append(box);
  }
  if (!isRunning) node.append(under(turn, isLast, retry));
  return node;
}

function laneView(lane, name, isRunning) {
  const node = el("div", name && `lane-${name}`), view = el("div", "answer"), rate = el("span");
  if (name) {
    const who = el("div", "who", name);
    who.append(rate);
    node.append(who);
  }
  node.append(view);
  const show = settings.view === "tokens" && (lane.tokens.length || isRunning) ? tokensOf(view, lane, name) : textOf(view, lane, isRunning);
  const grow = (fresh) => {
    rate.textContent = lane.rate ? `${lane.rate.toFixed(0)} tokens/s` : "";
    node.classList.toggle("ended", lane.finish !== null);
    show(fresh);
  };
  grow([]);
  return { node, grow };
}

function tokensOf(view, lane, name) {
  view.classList.add("tokens");
  view.tabIndex = 0;
  view.dir = "auto";
  view.setAttribute("role", "group");
  view.setAttribute("aria-label", `Tokens of the answer${name && `, ${name}`}`);
  append(view, lane.tokens);
  return (fresh) => append(view, fresh);
}

function textOf(view, lane, isRunning) {
  const text = el("div", "markdown"), markdown = new MarkdownView(text);
  let thought = null, isAsked = false;
  view.append(text);
  const draw = () => {
    isAsked = false;
    const found = THOUGHT.exec(lane.text);
    if (found) {
      if (!thought) view.prepend((thought = thoughtView()).node);
      thought.update(found[1], found[0].includes("</think>") || lane.finish !== null || !isRunning);
    }
    markdown.update(found ? lane.text.slice(found[0].length) : lane.text, !isRunning || lane.finish !== null);
  };
  draw();
  // at most once in what the screen shows
  return () => { if (isRunning && !isAsked) { isAsked = true; requestAnimationFrame(draw); } };
}

function thoughtView() {
  const node = el("details", "thought"), title = el("summary"), body = el("div", "markdown"), markdown = new MarkdownView(body);
  node.append(title, body);
  return {
    node,
    update(text, isWhole) {
      title.textContent = isWhole ? "Thoughts" : "Thinking …";
      markdown.update(text, isWhole);
    },
  };
}

function under(turn, isLast, retry) {
  const node = el("div", "under");
  if (isLast) node.append(iconButton("quiet", RETRY, "Retry", retry, "Retry"));
  if (turn.text) {
    const copy = iconButton("quiet", COPY, "Copy", () => copyText(turn.text, copy), "Copy");
    node.append(copy);
  }
  node.append(el("span", "facts", facts(turn)));
  return node;
}

function facts(turn) {
  const s = turn.stats, times = timesPlain(turn), parts = [];
  if (turn.stopped) parts.push("stopped");
  if (s && s.num_tokens) parts.push(`${s.num_tokens} tokens`);
  if (turn.rate) parts.push(`${turn.rate.toFixed(turn.rate < 10 ? 1 : 0)} tokens/s`);
  if (times) parts.push(timesText(times));
  if (s && s.num_drafts) parts.push(`${percent(s.acceptance_rate)} of drafted tokens accepted`);
  if (turn.finish === "length") parts.push("cut at the limit");
  return parts.join(", ");
}
