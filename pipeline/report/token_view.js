// The token view: a list of sequences, the text of one of them, and the teacher's distribution at
// one token. token_view.py describes the data. Text of a cache only ever becomes the text of a node.
"use strict";

const METRICS = {
  loss: { name: "surprise", unit: "nats", bounds: [0.1, 0.5, 1, 2, 3, 5, 7, 10] },
  entropy: { name: "entropy", unit: "nats", bounds: [0.1, 0.5, 1, 1.5, 2, 3, 4, 6] },
  rank: { name: "rank of the truth", unit: "0 is the teacher's first", bounds: [1, 2, 5, 10, 32, 100, 1000, 10000] },
  tail: { name: "tail mass", unit: "share outside the head", bounds: [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7] },
  kl: { name: "KL to the student", unit: "nats", bounds: [0.01, 0.03, 0.1, 0.3, 0.6, 1, 2, 4] },
  student: { name: "the student's surprise", unit: "nats", bounds: [0.1, 0.5, 1, 2, 3, 5, 7, 10] },
};
const MOST_SURPRISING = 500;
const MOST_HITS = 10000;
const LIST_STEP = 100;
const BLOCK = { least: 60, most: 160 };  // tokens; a block ends at a line end between these
const AT_ONCE = 4;  // blocks: about as many as the screen shows
const HIDDEN = /[\p{C}\p{Zl}\p{Zp}\p{Zs}]/u;  // and not a space: what Python calls not printable
const NAMES = { "\n": "\\n", "\r": "\\r", "\t": "\\t" };
const SIGNS = { "\n": "⏎\n", "\r": "␍", "\t": "→\t" };

const byId = (id) => document.getElementById(id);
const percent = (p) => (p >= 0.9995 || p === 0 ? `${Math.round(100 * p)}` : (100 * p).toPrecision(p < 0.1 ? 2 : 3)) + "\u00a0%";
const nats = (x) => (Number.isFinite(x) ? x.toFixed(3) : "∞");
const inEnglish = new Intl.NumberFormat("en");  // one for all: each new one takes a millisecond
const count = (n) => inEnglish.format(n);
const nextFrame = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function escaped(letter) {
  const code = letter.codePointAt(0), hex = code.toString(16);
  if (letter in NAMES) return NAMES[letter];
  return code < 0x100 ? `\\x${hex.padStart(2, "0")}` : code < 0x10000 ? `\\u${hex.padStart(4, "0")}` : `\\U${hex.padStart(8, "0")}`;
}

const RIGHT_TO_LEFT = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;

// The direction of a text by its first letter. Tokens that are signs of a template, such as <s>, do
// not count: they begin texts of all scripts.
function direction(texts) {
  for (const text of texts) {
    const letter = /^(?:<.*>|\[.*\])$/.test(text) ? null : /\p{L}/u.exec(text);
    if (letter) return RIGHT_TO_LEFT.test(letter[0]) ? "rtl" : "ltr";
  }
  return "ltr";
}

const isMark = (text) => /^\p{M}/u.test(text);

// A text in one line: spaces as dots, hidden characters as escapes.
function named(text) {
  let line = isMark(text) ? "◌" : "";
  for (const letter of text) line += letter === " " ? "·" : HIDDEN.test(letter) ? escaped(letter) : letter;
  return line;
}

// The distributions of a chunk, and where the lists of each token begin.
async function unpackedTeacher(number) {
  const found = await unpackedArrays(`teacher-${number}`);
  for (const name of ["head", "draw"]) {
    const sizes = found[`${name}_size`];
    if (!sizes) continue;
    const starts = new Int32Array(sizes.length + 1);
    for (let i = 0; i < sizes.length; i++) starts[i + 1] = starts[i] + sizes[i];
    found[`${name}_start`] = starts;
  }
  // What a student predicts there, if there is one.
  if (document.getElementById(`student-${number}`)) found.student = await unpackedArrays(`student-${number}`);
  return found;
}

class View {
  // first: what `unpackChunk(0)` gives, which is asked for while `data` is on its way.
  constructor(data, first) {
    this.data = data;
    this.sequences = data.sequences.map(([index, id, tokens, positions, mean, most, chunk, start], at) => ({ index, id, tokens, positions, mean, most, chunk, start, kl: data.student_kl?.[at] ?? null }));
    this.place = new Int32Array(data.vocab_size).fill(-1);  // by id
    data.ids.forEach((id, place) => { this.place[id] = place; });
    this.chunks = [];       // {token, loss, text, starts} by number, once they are there
    this.coming = [first.text];
    this.teachers = new Map([[0, first.teacher]]);
    this.byChunk = Array.from({ length: data.chunks }, () => []);
    this.sequences.forEach((sequence, at) => this.byChunk[sequence.chunk].push(at));
    this.surprising = [];
    this.order = this.sequences.map((_, at) => at);
  }

  textOf(id) { return this.data.texts[this.place[id]]; }

  label(id) {
    const text = this.textOf(id);
    if (text === undefined || text === "") return `<${id}>`;
    return Array.isArray(text) ? text.map((byte) => escaped(String.fromCharCode(byte))).join("") : named(text);
  }

  async chunk(number) {
    this.coming[number] ??= unpackedArrays(`text-${number}`);
    return (this.chunks[number] ??= await this.coming[number]);
  }

  // The distributions of a chunk. Two chunks are kept.
  teacher(number) {
    if (!this.teachers.has(number)) {
      this.teachers.set(number, unpackedTeacher(number));
      if (this.teachers.size > 2) this.teachers.delete(this.teachers.keys().next().value);
    }
    return this.teachers.get(number);
  }

  // Characters that tokens complete which are only parts of them: token -> text.
  wholes(tokens) {
    const found = new Map();
    let waiting = [];
    for (let i = 0; i < tokens.length; i++) {
      const text = this.textOf(tokens[i]);
      if (!Array.isArray(text)) { waiting = []; continue; }
      waiting.push(...text);
      try {
        found.set(i, new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(waiting)));
        waiting = [];
      } catch { if (waiting.length > 64) waiting = []; }
    }
    return found;
  }

  // Opens every chunk, for the search and the most surprising tokens, without holding up the page.
  async openAll() {
    let least = -Infinity;
    for (let number = 0; number < this.data.chunks; number++) {
      const chunk = await this.chunk(number);
      if (number + 1 < this.data.chunks) this.chunk(number + 1);  // unpacked while this one is read
      chunk.text = this.searchable(number, chunk);
      for (let i = 0; i < chunk.loss.length; i++) {
        if (chunk.loss[i] > least) this.surprising.push([chunk.loss[i], number, i]);
      }
      if (this.surprising.length > 4 * MOST_SURPRISING || number + 1 === this.data.chunks) {
        this.surprising.sort((a, b) => b[0] - a[0] || a[1] - b[1] || a[2] - b[2]);
        this.surprising.length = Math.min(this.surprising.length, MOST_SURPRISING);
        if (this.surprising.length === MOST_SURPRISING) least = this.surprising.at(-1)[0];
      }
    }
  }

  // The chunk's text in small letters; `starts` are the places of the tokens in it. A sequence ends
  // with a character that nobody can type.
  searchable(number, chunk) {
    const tokens = chunk.token, parts = new Array(tokens.length), starts = new Int32Array(tokens.length + 1);
    const ends = new Set(this.byChunk[number].map((at) => this.sequences[at].start + this.sequences[at].tokens - 1));
    const wholes = this.wholes(tokens);
    this.lower ??= this.data.texts.map((text) => (typeof text === "string" ? text.toLowerCase() : ""));
    for (let i = 0, at = 0; i < tokens.length; i++) {
      const part = (wholes.get(i)?.toLowerCase() ?? this.lower[this.place[tokens[i]]] ?? "") + (ends.has(i) ? "\u{10ffff}" : "");
      parts[i] = part;
      at += part.length;
      starts[i + 1] = at;
    }
    chunk.starts = starts;
    return parts.join("");
  }

  // [chunk, first token, last token] of every hit, in order. `#12` finds the id 12.
  search(query) {
    const hits = [], id = /^#(\d+)$/.exec(query);
    const wanted = query.toLowerCase().replace(/⏎|\\n/g, "\n").replace(/\\t/g, "\t").replace(/·/g, " ");
    for (let number = 0; number < this.data.chunks; number++) {
      const chunk = this.chunks[number];
      if (id) {
        for (let i = chunk.token.indexOf(Number(id[1])); i >= 0; i = chunk.token.indexOf(Number(id[1]), i + 1)) {
          if (hits.push([number, i, i]) >= MOST_HITS) return hits;
        }
      } else {
        for (let at = chunk.text.indexOf(wanted); at >= 0; at = chunk.text.indexOf(wanted, at + wanted.length)) {
          if (hits.push([number, tokenAt(chunk.starts, at), tokenAt(chunk.starts, at + wanted.length - 1)]) >= MOST_HITS) return hits;
        }
      }
    }
    return hits;
  }

  // The sequence of a token of a chunk: its place in `sequences`.
  sequenceAt(number, token) {
    return this.byChunk[number].findLast((at) => this.sequences[at].start <= token);
  }
}

// The token that holds the character at `at`: the last one that begins there or before.
function tokenAt(starts, at) {
  let low = 0, high = starts.length - 1;
  while (low < high - 1) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= at) low = middle; else high = middle;
  }
  while (low > 0 && starts[low + 1] === starts[low]) low--;
  return low;
}

class Reader {
  constructor(view) {
    this.view = view;
    this.pane = byId("text");
    this.metric = "loss";
    this.shown = null;      // the sequence on the screen
    this.chosen = -1;
    this.blocks = [];
    this.hit = null;        // [first, last] token of the hit on the screen
    this.pointed = null;    // the token below the mouse
    this.watcher = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) this.fill(target); else this.empty(target);
      }
    }, { root: this.pane, rootMargin: "600px 0px" });
    this.pane.addEventListener("click", ({ target }) => {
      const token = target.closest(".t");
      if (token) this.choose(Number(token.dataset.i), { focus: true });
    });
    // Not pointerover: text that is scrolled below a still pointer, as by a search, has one, too.
    this.pane.addEventListener("pointermove", ({ target, pointerType }) => {
      const token = target.closest(".t");
      if (token === this.pointed || pointerType !== "mouse") return;
      this.pointed = token;
      if (token) this.describe(Number(token.dataset.i));
    });
    this.pane.addEventListener("pointerleave", () => { this.pointed = null; if (this.chosen >= 0) this.describe(this.chosen); });
    this.pane.addEventListener("keydown", (event) => this.key(event));
    this.pane.addEventListener("focus", () => { if (this.shown) this.choose(Math.max(0, this.chosen), { focus: true }); });
    addEventListener("beforeprint", () => this.blocks.slice(0, 200).forEach((block) => this.fill(block)));
  }

  async show(at, { token = -1, hit = null, focus = false } = {}) {
    const sequence = this.view.sequences[at];
    this.wanted = at;
    if (this.shown !== sequence) {
      const [chunk, teacher] = await Promise.all([this.view.chunk(sequence.chunk), this.view.teacher(sequence.chunk)]);
      if (this.wanted !== at) return;  // another one was asked for in the meantime
      const end = sequence.start + sequence.tokens;
      this.shown = sequence;
      this.tokens = chunk.token.subarray(sequence.start, end);
      this.teacher = teacher;
      this.values = {
        loss: chunk.loss.subarray(sequence.start, end),
        entropy: teacher.entropy?.subarray(sequence.start, end),
        rank: teacher.rank.subarray(sequence.start, end),
        tail: teacher.tail.subarray(sequence.start, end).map(Math.exp),
        kl: teacher.student?.kl.subarray(sequence.start, end),
        student: teacher.student?.loss.subarray(sequence.start, end),
      };
      this.wholes = this.view.wholes(this.tokens);
      this.chosen = -1;
      this.layOut();
      byId("reading").textContent = named(sequence.id);
      byId("reading-more").textContent = `sequence ${count(sequence.index)}: ${count(sequence.tokens)} tokens, ${count(sequence.positions)} predicted` + (sequence.mean === null ? "" : `, ${sequence.mean.toFixed(2)} nats each`) + (sequence.kl === null ? "" : `, KL ${sequence.kl.toFixed(3)}`);
      byId("details").replaceChildren(make("p", { className: "quiet", textContent: "Point at a token, tap it, or move with the arrow keys." }));
      for (const button of document.querySelectorAll("#sequences button")) button.setAttribute("aria-current", String(Number(button.dataset.at) === at));
    }
    this.hit = hit;
    for (const each of this.pane.querySelectorAll(".hit")) each.classList.remove("hit");
    if (token >= 0) this.choose(token, { focus, middle: true });
  }

  // Empty blocks of tokens; each is filled when it comes near the screen.
  layOut() {
    this.watcher.disconnect();
    this.pane.replaceChildren();
    this.blocks = [];
    this.pane.scrollTop = 0;
    const perLine = Math.max(20, this.pane.clientWidth / 9);
    let begin = 0, letters = 0, lines = 0;
    for (let i = 0; i < this.tokens.length; i++) {
      const text = this.view.textOf(this.tokens[i]) ?? "";
      const ends = typeof text === "string" && text.endsWith("\n"), size = i + 1 - begin;
      letters += text.length;
      if (ends) { lines += Math.ceil(letters / perLine); letters = 0; }
      if ((ends && size >= BLOCK.least) || size >= BLOCK.most || i + 1 === this.tokens.length) {
        const texts = Array.from(this.tokens.subarray(begin, i + 1), (id) => this.view.textOf(id));
        const dir = direction(texts.filter((each) => typeof each === "string"));
        const block = make("div", { className: "block", role: "presentation", dir });
        Object.assign(block, { begin, end: i + 1, full: false });
        block.style.minHeight = `${1.9 * (lines + Math.ceil(letters / perLine))}rem`;
        this.pane.append(block);
        this.blocks.push(block);
        this.watcher.observe(block);
        begin = i + 1; letters = lines = 0;
      }
    }
    this.blocks.slice(0, AT_ONCE).forEach((block) => this.fill(block));  // the watcher waits for a frame
  }

  fill(block) {
    if (block.full) return;
    block.full = true;
    const spans = [];
    for (let i = block.begin; i < block.end; i++) spans.push(this.span(i));
    block.replaceChildren(...spans);
    block.style.minHeight = "";
  }

  // Empties a block far from the screen, unless it holds the chosen token, which may have the focus.
  empty(block) {
    if (!block.full || (this.chosen >= block.begin && this.chosen < block.end)) return;
    block.style.minHeight = `${block.offsetHeight}px`;
    block.replaceChildren();
    block.full = false;
  }

  span(i) {
    const id = this.tokens[i], text = this.view.textOf(id), hit = this.hit && i >= this.hit[0] && i <= this.hit[1];
    const span = make("span", { className: `t ${this.level(i)}${hit ? " hit" : ""}`, role: "option", tabIndex: i === this.chosen ? 0 : -1 });
    span.dataset.i = i;
    span.setAttribute("aria-selected", String(i === this.chosen));
    if (text === undefined || text === "") span.append(sign(`<${id}>`));
    else if (Array.isArray(text)) {
      span.append(sign(text.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")));
      if (this.wholes.has(i)) span.append(...visible(this.wholes.get(i)));
    } else span.append(...visible(text));
    return span;
  }

  level(i) {
    const value = this.values[this.metric]?.[i];
    if (value === undefined || Number.isNaN(value) || (this.metric === "rank" && value < 0)) return "masked";
    const bounds = METRICS[this.metric].bounds;
    let level = 0;
    while (level < bounds.length && value >= bounds[level]) level++;
    return `heat h${level}`;
  }

  colour(metric) {
    this.metric = metric;
    for (const span of this.pane.querySelectorAll(".t")) {
      const i = Number(span.dataset.i);
      span.className = `t ${this.level(i)}${span.classList.contains("hit") ? " hit" : ""}`;
    }
    const { unit, bounds } = METRICS[metric];
    const short = (x) => (metric === "tail" ? `${100 * x} %` : count(x));
    byId("legend").replaceChildren(
      make("span", { className: "quiet", textContent: `${unit}:` }),
      ...[0, ...bounds].map((low, level) => make("span", { className: `swatch heat h${level}`, textContent: level === 0 ? `< ${short(bounds[0])}` : level === bounds.length ? `≥ ${short(low)}` : short(low) })),
      make("span", { className: "masked", textContent: "not predicted" }),
    );
  }

  element(i) {
    const block = this.blocks.find((each) => i >= each.begin && i < each.end);
    this.fill(block);
    return block.children[i - block.begin];
  }

  choose(i, { focus = false, middle = false } = {}) {
    if (this.chosen >= 0) {
      const before = this.element(this.chosen);
      before.tabIndex = -1;
      before.setAttribute("aria-selected", "false");
    }
    this.chosen = i;
    if (this.hit) for (let at = this.hit[0]; at <= this.hit[1]; at++) this.element(at).classList.add("hit");
    const token = this.element(i);
    token.tabIndex = 0;
    this.pane.tabIndex = -1;
    token.setAttribute("aria-selected", "true");
    if (middle && this.pane.getBoundingClientRect().bottom > innerHeight) byId("reading").scrollIntoView();
    const top = token.offsetTop - this.pane.offsetTop, height = this.pane.clientHeight;
    if (middle || top < this.pane.scrollTop + 40 || top > this.pane.scrollTop + height - 60) {
      this.pane.scrollTop = middle ? top - height / 2 : top < this.pane.scrollTop + 40 ? top - 60 : top - height + 90;
    }
    if (focus) token.focus({ preventScroll: true });
    this.describe(i);
    byId("said").textContent = this.sentence(i);
  }

  sentence(i) {
    const loss = this.values.loss[i], name = `token ${i}, ${this.view.label(this.tokens[i])}`;
    if (Number.isNaN(loss)) return `${name}: not predicted`;
    return `${name}: surprise ${nats(loss)} nats, probability ${percent(Math.exp(-loss))}, rank ${count(this.values.rank[i])}`;
  }

  key(event) {
    if (!this.shown || event.altKey || event.ctrlKey || event.metaKey) return;
    const i = this.chosen, last = this.tokens.length - 1;
    const right = getComputedStyle(this.element(Math.max(0, i)).parentElement).direction === "rtl" ? -1 : 1;
    const moves = {
      ArrowRight: () => i + right, ArrowLeft: () => i - right, Home: () => 0, End: () => last,
      ArrowDown: () => this.line(i, 1), ArrowUp: () => this.line(i, -1),
    };
    if (event.key in moves) {
      event.preventDefault();
      this.choose(Math.min(last, Math.max(0, moves[event.key]())), { focus: true });
    }
  }

  // The nearest token of the line below (1) or above (-1).
  line(i, way) {
    const place = (at) => this.element(at).getBoundingClientRect(), from = place(i);
    let best = i, distance = Infinity, line = null;
    for (let at = i + way; at >= 0 && at < this.tokens.length; at += way) {
      const here = place(at);
      if (Math.abs(here.top - from.top) < 4) continue;
      line ??= here.top;
      if (Math.abs(here.top - line) > 4) break;
      const off = Math.abs(here.left - from.left);
      if (off < distance) { distance = off; best = at; }
    }
    return best;
  }

  describe(i) {
    const id = this.tokens[i], loss = this.values.loss[i], at = this.shown.start + i, found = [];
    found.push(make("h4", { className: "token-name" }, make("bdi", { textContent: this.view.label(id) })));
    if (this.wholes.has(i)) found.push(make("p", { className: "note", textContent: `completes ${named(this.wholes.get(i))}` }));
    const facts = make("dl", { className: "facts" });
    const fact = (name, value) => facts.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
    fact("token", `${count(i)}, id ${count(id)}`);
    if (Number.isNaN(loss)) {
      fact("teacher", i === 0 ? "nothing predicts the first token" : "outside the loss mask: no prediction is stored");
      byId("details").replaceChildren(...found, facts);
      return;
    }
    const rank = this.values.rank[i];
    fact("probability", percent(Math.exp(-loss)));
    fact("surprise", `${nats(loss)} nats`);
    fact("rank", count(rank) + (rank === 0 ? ", the teacher's first" : ""));
    if (this.values.entropy) fact("entropy", `${nats(this.values.entropy[i])} nats`);
    if (this.values.student && !Number.isNaN(this.values.student[i])) {
      fact("student", `probability ${percent(Math.exp(-this.values.student[i]))}, surprise ${nats(this.values.student[i])} nats`);
      if (!Number.isNaN(this.values.kl[i])) fact("KL", `${nats(this.values.kl[i])} nats`);
    }
    found.push(facts, ...this.head(at, id, loss, rank, this.values.tail[i]), ...this.draws(at));
    byId("details").replaceChildren(...found);
  }

  head(at, target, loss, rank, tail) {
    const { head_start: starts, head_ids: ids, head_logprobs: logprobs } = this.teacher, rows = [];
    const { student } = this.teacher, q = (e) => (student ? Math.exp(student.head_logprobs[e]) : NaN);
    const read = student && !Number.isNaN(student.loss[at]);
    let listed = false, most = Math.max(tail, read ? Math.exp(student.tail[at]) : 0);
    for (let e = starts[at]; e < starts[at + 1]; e++) most = Math.max(most, Math.exp(logprobs[e]), read ? q(e) : 0);
    const bar = (p, kind) => Object.assign(make("span", { className: kind }), { style: `width:${(100 * p / most).toFixed(2)}%` });
    // p: of the teacher, q: of the student, below it.
    const row = (label, p, q, kind, note = "") => rows.push(make("tr", { className: kind },
      make("th", { scope: "row" }, make("bdi", { textContent: label }), note && make("span", { className: "quiet note", textContent: ` ${note}` })),
      make("td", { className: "track" }, bar(p, "bar"), read ? bar(q, "bar of-student") : ""),
      make("td", { className: "n" }, percent(p), read ? make("span", { className: "q", textContent: percent(q) }) : "")));
    for (let e = starts[at]; e < starts[at + 1]; e++) {
      const here = ids[e] === target;
      listed ||= here;
      row(this.view.label(ids[e]), Math.exp(logprobs[e]), q(e), here ? "target" : "", here ? "is next" : "");
    }
    const size = starts[at + 1] - starts[at];
    if (!listed) row(this.view.label(target), Math.exp(-loss), read ? Math.exp(-student.loss[at]) : NaN, "target", `is next, rank ${count(rank)}`);
    row(`all ${count(this.view.data.vocab_size - size)} others`, tail, read ? Math.exp(student.tail[at]) : NaN, "tail");
    const key = read ? [make("p", { className: "note" }, make("span", { className: "bar key-bar" }), " teacher ", make("span", { className: "bar of-student key-bar" }), " student")] : [];
    return [make("h5", { textContent: `The teacher's head, ${size} ids, each within ${percent(this.view.data.rounding)}` }), ...key, make("table", { className: "bars", ariaLabel: "The stored head" }, make("tbody", {}, ...rows))];
  }

  draws(at) {
    const { draw_start: starts, draw_ids: ids, draw_logprobs: logprobs } = this.teacher;
    if (!starts) return [];
    const drawn = new Map();
    for (let e = starts[at]; e < starts[at + 1]; e++) drawn.set(ids[e], [(drawn.get(ids[e])?.[0] ?? 0) + 1, logprobs?.[e]]);
    const list = make("ul", { className: "draws" });
    for (const [id, [times, logprob]] of drawn) {
      list.append(make("li", {}, make("bdi", { textContent: this.view.label(id) }), make("span", { className: "quiet", textContent: (times > 1 ? ` ×${times}` : "") + (logprob === undefined ? "" : ` ${percent(Math.exp(logprob))}`) })));
    }
    return [make("h5", { textContent: `Drawn from the others, ${starts[at + 1] - starts[at]}` }), drawn.size ? list : make("p", { className: "quiet note", textContent: "no draws: the head holds nearly all" })];
  }
}

const sign = (text) => make("span", { className: "sign", textContent: text });

// A token's text as nodes: signs for whitespace and hidden characters, the rest as it is.
function visible(text) {
  const nodes = [];
  let plain = "";
  const put = (node) => { if (plain) nodes.push(plain); plain = ""; if (node) nodes.push(node); };
  if (isMark(text)) put(sign("◌"));
  const blank = /^\s+$/.test(text);
  for (const letter of text) {
    if (letter === " ") { if (blank) put(sign("·")); else plain += letter; }
    else if (letter in SIGNS) put(sign(SIGNS[letter]));
    else if (HIDDEN.test(letter)) put(sign(escaped(letter)));
    else plain += letter;
  }
  put();
  return nodes;
}

class List {
  constructor(view, open) {
    this.view = view;
    this.list = byId("sequences");
    this.most = LIST_STEP;
    this.list.addEventListener("click", ({ target }) => {
      const button = target.closest("button");
      if (button) open(Number(button.dataset.at));
    });
    byId("more").addEventListener("click", () => { this.most += LIST_STEP; this.draw(); });
    for (const id of ["filter", "sort", "least"]) byId(id).addEventListener("input", () => { this.most = LIST_STEP; this.draw(); });
    this.draw();
  }

  draw() {
    const wanted = byId("filter").value.toLowerCase(), least = Number(byId("least").value) || 0, sequences = this.view.sequences;
    const keys = { order: (s) => s.index, longest: (s) => -s.tokens, hardest: (s) => -(s.mean ?? -1), kl: (s) => -(s.kl ?? -1), easiest: (s) => s.mean ?? Infinity, peak: (s) => -(s.most ?? -1) };
    const key = keys[byId("sort").value];
    const found = this.view.order
      .filter((at) => sequences[at].tokens >= least && (!wanted || sequences[at].id.toLowerCase().includes(wanted)))
      .sort((a, b) => key(sequences[a]) - key(sequences[b]) || a - b);
    this.found = found;
    this.list.replaceChildren(...found.slice(0, this.most).map((at) => {
      const { id, tokens, mean, most } = sequences[at];
      const button = make("button", { type: "button" }, make("bdi", { textContent: named(id) }), make("span", { className: "quiet", textContent: `${count(tokens)} tokens` + (mean === null ? "" : `, ${mean.toFixed(2)} nats, at most ${most.toFixed(1)}`) }));
      button.dataset.at = at;
      button.setAttribute("aria-current", String(reader?.shown === sequences[at]));
      return make("li", {}, button);
    }));
    byId("found").textContent = `${count(found.length)} of ${count(sequences.length)} sequences`;
    byId("more").hidden = found.length <= this.most;
  }
}

let reader = null;

async function start() {
  if (!byId("tokens")) return;
  if (typeof DecompressionStream === "undefined") {
    byId("reading-more").textContent = "This browser is too old for the token view (it has no DecompressionStream).";
    return;
  }
  const first = { text: unpackedArrays("text-0"), teacher: unpackedTeacher(0) };
  const view = new View(await unpackedJson("view"), first);
  if (matchMedia("(max-width: 44rem)").matches) byId("list").open = false;
  reader = new Reader(view);
  const open = (at, more) => { reader.show(at, more); };
  const list = new List(view, open);
  const metric = byId("metric");
  metric.addEventListener("input", () => reader.colour(metric.value));
  reader.colour(metric.value);

  let hits = [], at = -1, query = "", surprise = -1;
  const go = ([number, first, last], focus) => {
    const place = view.sequenceAt(number, first), begin = view.sequences[place].start;
    return reader.show(place, { token: first - begin, hit: [first - begin, Math.max(first, last) - begin], focus });
  };
  let allOpened;
  const opened = new Promise((resolve) => { allOpened = resolve; });
  const find = async (way) => {
    await opened;
    const wanted = byId("query").value;
    if (wanted !== query) {
      query = wanted;
      hits = wanted ? view.search(wanted) : [];
      at = -1;
    }
    if (!hits.length) { byId("hits").textContent = wanted ? "not found" : ""; return; }
    at = (at + way + hits.length + (at < 0 && way < 0 ? 1 : 0)) % hits.length;
    byId("hits").textContent = `${count(at + 1)} of ${count(hits.length)}${hits.length === MOST_HITS ? " or more" : ""}`;
    await go(hits[at], false);
  };
  byId("search").addEventListener("submit", (event) => { event.preventDefault(); find(1); });
  byId("next").addEventListener("click", () => find(1));
  byId("previous").addEventListener("click", () => find(-1));
  const jump = async (way) => {
    await opened;
    if (!view.surprising.length) return;
    surprise = (surprise + way + view.surprising.length + (surprise < 0 && way < 0 ? 1 : 0)) % view.surprising.length;
    const [loss, number, token] = view.surprising[surprise];
    byId("surprise").textContent = `${count(surprise + 1)} of ${count(view.surprising.length)}: ${loss.toFixed(2)} nats`;
    await go([number, token, token], false);
  };
  byId("more-surprising").addEventListener("click", () => jump(-1));
  byId("less-surprising").addEventListener("click", () => jump(1));

  const follow = () => {
    const found = /^#sequence-(\d+)(?:-token-(\d+))?$/.exec(location.hash);
    const place = found ? view.sequences.findIndex(({ index }) => index === Number(found[1])) : -1;
    if (place < 0) return false;
    byId("tokens").scrollIntoView();
    reader.show(place, { token: Math.min(Number(found[2] ?? 0), view.sequences[place].tokens - 1) });
    return true;
  };
  addEventListener("hashchange", follow);
  if (!follow() && list.found.length) await reader.show(list.found[0]);
  await nextFrame();  // the text is on the screen before everything else is opened
  await view.openAll();
  allOpened();
  document.documentElement.dataset.ready = "yes";
}

start();
