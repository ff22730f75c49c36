// Runs the program of the page against a server, with as much of a browser as it uses.
// Usage: node page_program.mjs PAGE URL PICTURE QUESTION…; prints what is shown as JSON.
import { readFileSync } from "node:fs";

const [file, url, picture, ...questions] = process.argv.slice(2);
const html = readFileSync(file, "utf8");

class Element {
  constructor(kind) {
    Object.assign(this, { kind, children: [], listeners: {}, dataset: {}, value: "", textContent: "" });
    const names = new Set();
    this.classList = { add: (name) => names.add(name), remove: (name) => names.delete(name), names };
  }
  append(...more) { this.children.push(...more); }
  prepend(...more) { this.children.unshift(...more); }
  replaceChildren(...more) { this.children = more; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  focus() {}
  getContext() {
    this.rects = 0;
    const nothing = () => {};
    return { fillRect: nothing, drawImage: nothing, beginPath: nothing, clip: nothing,
             rect: () => { this.rects += 1; } };
  }
}

const known = {};
for (const [, id] of html.matchAll(/id="(\w+)"/g)) known[id] = new Element(id);
known.own.checked = true;
globalThis.document = {
  getElementById: (id) => known[id],
  createElement: (kind) => new Element(kind),
  addEventListener: () => {},
};
globalThis.window = { prompt: () => "secret" };
globalThis.Image = class extends Element { async decode() {} };
globalThis.FileReader = class {
  readAsDataURL(file) { this.result = file.url; queueMicrotask(() => this.onload()); }
};
const plain = globalThis.fetch;
globalThis.fetch = (path, options) => plain(new URL(path, url), options);

(0, eval)(html.match(/<script>([\s\S]*)<\/script>/)[1]);
const content = readFileSync(picture).toString("base64");
known.file.files = [{ type: "image/png", url: "data:image/png;base64," + content }];
await known.file.listeners.change();
await new Promise((done) => setTimeout(done, 0));
for (const question of questions) {
  known.question.value = question;
  await known.ask.listeners.submit({ preventDefault() {} });
}
while (!known.model.textContent) await new Promise((done) => setTimeout(done, 5));
console.log(JSON.stringify({
  model: known.model.textContent,
  turns: known.turns.children.map((turn) => ({
    question: turn.children[0].textContent,
    answer: turn.children[1].textContent,
    failed: turn.children[1].classList.names.has("error"),
    figures: turn.children[2].textContent,
    panels: turn.children[3].children.map((figure) => ({
      rects: figure.children[0].rects, caption: figure.children[1].textContent })),
  })),
}));
