// Markdown as elements. What a model writes is nobody's to trust: it becomes text nodes and the few elements that are made
// here, never markup; links lead to the web or to mail only, and pictures are links, so that nothing is loaded.

import { CodeBlock } from "./code.js";
import { el } from "./state.js";
import { Marked } from "./vendor/marked.js";

// single line breaks count, as in poems; HTML is text
const marked = new Marked({ gfm: true, breaks: true, tokenizer: { html: () => undefined, tag: () => undefined } });
const SCHEMES = ["http:", "https:", "mailto:"];
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", reg: "®", hellip: "…", ndash: "–", mdash: "—", times: "×", deg: "°", euro: "€", larr: "←", rarr: "→", le: "≤", ge: "≥", ne: "≠" };

// A text that may grow, as Markdown in `node`. Blocks that have not changed are left as they are: nothing flickers, and a
// selection, or the place to which code was scrolled, outlives what comes after it.
export class MarkdownView {
  constructor(node) {
    this.node = node;
    this.blocks = [];
    this.links = "";
  }

  update(text, isWhole) {
    let tokens;
    try { tokens = marked.lexer(isWhole ? text : closed(text)); }
    catch { tokens = [{ type: "text", raw: text, text }]; /* nested deeper than the parser goes */ }
    const links = JSON.stringify(tokens.links || {});
    const fresh = tokens.filter((t) => t.type !== "space" && t.type !== "def");
    let same = 0;
    if (links === this.links) while (same < this.blocks.length && same < fresh.length && this.blocks[same].raw === fresh[same].raw && this.blocks[same].type === fresh[same].type) same++;
    const last = this.blocks[same], next = fresh[same];
    if (last && next && last.code && next.type === "code") {  // code that grows
      last.code.update(next.text, next.lang);
      last.raw = next.raw;
      same++;
    }
    for (const block of this.blocks.splice(same)) block.node.remove();
    for (const token of fresh.slice(same)) {
      const code = token.type === "code" ? new CodeBlock(token.text, token.lang) : null;
      const node = code ? code.node : block(token);
      this.blocks.push({ type: token.type, raw: token.raw, code, node });
      this.node.append(node);
    }
    this.links = links;
  }
}

// A text that goes on, with what is still open at its end closed or left out, so that it does not look like something else
// until the rest is there.
export function closed(text) {
  const lines = text.split("\n");
  let fence = null;
  for (const line of lines) {
    const mark = /^ {0,3}(`{3,}|~{3,})/.exec(line);
    if (!mark) continue;
    if (!fence) fence = mark[1];
    else if (line.trim()[0] === fence[0] && mark[1].length >= fence.length && line.trim() === mark[1]) fence = null;
  }
  const last = lines.length - 1;
  if (/^ {0,3}(`{1,2}|~{1,2})$/.test(lines[last])) lines[last] = "";  // of a fence that begins or ends
  if (fence) return lines.join("\n");
  if (/^ {0,3}(-+|=+)[ \t]*$/.test(lines[last])) lines[last] = "";  // it would make a heading of the line above
  let line = lines[last].replace(/!?\[([^\]\n]*)\]\([^)\n]*$/, "$1").replace(/(^|[\s([])[*_]{1,3}$/, "$1");
  if ((line.match(/`/g) || []).length % 2) line += "`";
  const prose = line.replace(/`[^`]*`/g, "").replace(/^\s*[*+-] /, "").replace(/\\[*]/g, "");
  if ((prose.match(/\*\*/g) || []).length % 2) line = line.endsWith("*") && !line.endsWith("**") ? `${line}*` : `${line}**`;
  else if ((prose.replace(/\*\*/g, "").match(/(?<!\s)\*|\*(?!\s)/g) || []).length % 2) line += "*";
  lines[last] = line;
  return lines.join("\n");
}

const MAKERS = {
  heading: (t) => inlines(flow(`h${Math.min(6, t.depth + 2)}`), t.tokens),  // the page itself has the first two
  paragraph: (t) => inlines(flow("p"), t.tokens),
  text: (t) => t.tokens ? inlines(flow("p"), t.tokens) : flow("p", decoded(t.text)),
  blockquote: (t) => blocks(flow("blockquote"), t.tokens),
  hr: () => el("hr"),
  code: (t) => new CodeBlock(t.text, t.lang).node,
  list: (t) => {
    const list = el(t.ordered ? "ol" : "ul");
    if (t.ordered && t.start !== 1) list.start = t.start;
    list.append(...t.items.map(item));
    return list;
  },
  table: (t) => {
    const frame = el("div", "table"), table = el("table"), head = el("thead"), body = el("tbody");
    frame.tabIndex = 0;
    frame.setAttribute("role", "region");
    frame.setAttribute("aria-label", "Table");
    head.append(row(t.header, "th", t.align));
    body.append(...t.rows.map((cells) => row(cells, "td", t.align)));
    table.append(head, body);
    frame.append(table);
    return frame;
  },
};

const INLINE_MAKERS = {
  strong: (t) => inlines(el("strong"), t.tokens),
  em: (t) => inlines(el("em"), t.tokens),
  del: (t) => inlines(el("del"), t.tokens),
  codespan: (t) => el("code", "", t.text),
  br: () => el("br"),
  escape: (t) => document.createTextNode(t.text),
  link: (t) => link(decoded(t.href), inlines(el("a"), t.tokens)),
  image: (t) => link(decoded(t.href), el("a", "", `[image: ${t.text || t.href}]`)),
  checkbox: (t) => document.createTextNode(t.checked ? "☑ " : "☐ "),
};

// Its direction is that of its own text.
function flow(tag, text) {
  const node = el(tag, "", text);
  node.dir = "auto";
  return node;
}

const block = (token) => MAKERS[token.type] ? MAKERS[token.type](token) : flow("p", token.raw);

function blocks(node, tokens) {
  node.append(...tokens.filter((t) => t.type !== "space" && t.type !== "def").map(block));
  return node;
}

function inlines(node, tokens) {
  node.append(...tokens.map((t) => INLINE_MAKERS[t.type] ? INLINE_MAKERS[t.type](t) : t.tokens ? inlines(el("span"), t.tokens) : document.createTextNode(decoded(t.text ?? t.raw))));
  return node;
}

function item(token) {
  const node = flow("li");
  if (token.task) node.className = "task";
  for (const child of token.tokens) {
    if (child.type === "text" && child.tokens) inlines(node, child.tokens);  // an item of a tight list has no paragraph
    else if (child.type === "checkbox") node.append(INLINE_MAKERS.checkbox(child));
    else if (child.type !== "space") node.append(block(child));
  }
  return node;
}

function row(cells, tag, align) {
  const node = el("tr");
  cells.forEach((cell, i) => {
    const made = inlines(flow(tag), cell.tokens);
    if (align[i]) made.className = `to-${align[i]}`;
    node.append(made);
  });
  return node;
}

// An address that leads to none of the allowed places stays what was written.
function link(href, node) {
  let url = null;
  try { url = new URL(href); } catch { /* no whole address */ }
  if (!url || !SCHEMES.includes(url.protocol)) {
    const span = el("span");
    span.append(...node.childNodes, ` (${href})`);
    return span;
  }
  node.href = url.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  node.title = url.href;
  return node;
}

// The parser has decoded those that are numbers.
const decoded = (text) => text.replace(/&(\w{2,8});/g, (whole, name) => Object.hasOwn(ENTITIES, name) ? ENTITIES[name] : whole);
