// A block of code: its language, a button that copies it, and colours where the language is known here.

import { copyText, el } from "./state.js";

const FILES = {
  bash: "bash sh shell zsh console", c: "c h", cpp: "cpp c++ cc cxx hpp cuda", css: "css", diff: "diff patch", go: "go golang", java: "java",
  javascript: "javascript js jsx mjs node", json: "json jsonc", python: "python py python3", rust: "rust rs", sql: "sql sqlite postgresql mysql",
  typescript: "typescript ts tsx", xml: "xml html xhtml svg", yaml: "yaml yml",
};
const FILE_OF = new Map(Object.entries(FILES).flatMap(([file, names]) => names.split(" ").map((name) => [name, file])));
const MOST_LETTERS = 50_000;  // longer code stays plain: colours would hold up the page

const ready = new Map();  // by file, the highlighter that knows it, or null as long as it is on its way

export class CodeBlock {
  constructor(text, language) {
    this.node = el("figure", "code");
    this.name = el("span");
    this.body = el("code");
    const bar = el("figcaption"), copy = el("button", "quiet"), pre = el("pre");
    copy.type = "button";
    copy.append(el("span", "", "Copy"));
    copy.onclick = () => copyText(this.text, copy);
    bar.append(this.name, copy);
    pre.append(this.body);
    this.node.dir = "ltr";
    pre.tabIndex = 0;  // so that keys scroll it
    pre.setAttribute("role", "region");
    this.pre = pre;
    this.node.append(bar, pre);
    this.update(text, language);
  }

  update(text, language) {
    if (text === this.text && language === this.language) return;
    this.text = text;
    this.language = language;
    const name = (language || "").trim().split(/[\s{:,]/)[0].toLowerCase();
    this.name.textContent = name || "code";
    this.pre.setAttribute("aria-label", name ? `Code, ${name}` : "Code");
    this.colour(FILE_OF.get(name));
  }

  colour(file) {
    const highlighter = file && this.text.length <= MOST_LETTERS ? ready.get(file) : null;
    if (highlighter) this.body.replaceChildren(...highlighter.highlight(this.text, { language: file, ignoreIllegals: true })._emitter.root.childNodes);
    else this.body.textContent = this.text;
    if (file && !ready.has(file)) load(file);
    if (file && ready.get(file) === null) waiting.push(() => this.colour(file));
  }
}

// Highlight.js speaks of what it finds to an emitter; this one makes elements, where its own writes markup.
class Elements {
  constructor() {
    this.root = document.createDocumentFragment();
    this.open = [this.root];
  }
  addText(text) { this.open[this.open.length - 1].append(text); }
  startScope(scope) {
    const node = el("span", `c-${scope.split(".")[0]}`);
    this.open[this.open.length - 1].append(node);
    this.open.push(node);
  }
  endScope() { this.open.pop(); }
  openNode(scope) { this.startScope(scope); }
  closeNode() { this.endScope(); }
  __addSublanguage(inner) { this.open[this.open.length - 1].append(inner.root); }
  finalize() {}
  toHTML() { return ""; }
}

let waiting = [];

async function load(file) {
  ready.set(file, null);
  const [core, grammar] = await Promise.all([import("./vendor/highlight.js"), import(`./vendor/languages/${file}.js`)]);
  core.default.configure({ __emitter: Elements });
  core.default.registerLanguage(file, grammar.default);
  ready.set(file, core.default);
  const now = waiting;
  waiting = [];
  for (const run of now) run();
}
