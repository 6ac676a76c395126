"use strict";
// What the page does: from a chosen patch, or a chosen picture, to cosines, an order and heat maps. Names of files are
// hostile: they go into the page as text only.

const described = JSON.parse(document.getElementById("described").textContent);
const { pictures, dims, step, heat } = described;
const bar = document.getElementById("bar");
const tip = document.getElementById("tip");
const main = document.querySelector("main");

// Patches of all pictures are numbered through; those of picture p begin at pictures[p].first.
let total = 0;
for (const picture of pictures) {
  picture.first = total;
  total += picture.rows * picture.columns;
}

let patches, colours, cls; // Int8 [dims, total], Uint8 [3, total], Int16 [pictures, pictures]
let choice = { picture: 0, row: 0, column: 0 }; // without row and column: the whole picture
let cosines = null; // Float32 [total] with the chosen patch; null when a picture is chosen
let range = [0, 1];
let chosenView = null;
const views = [];

async function unpacked(id) {
  const text = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// ---- figures

function cosinesWith(patch) {
  const found = new Float32Array(total);
  for (let k = 0; k < dims; k++) {
    const row = k * total;
    const weight = patches[row + patch] * step * step;
    for (let i = 0; i < total; i++) found[i] += weight * patches[row + i];
  }
  found[patch] = 1; // known, whatever the dimensions that were left out held
  return found;
}

function bestPatch(picture) {
  let best = picture.first;
  const end = picture.first + picture.rows * picture.columns;
  for (let i = best; i < end; i++) if (cosines[i] > cosines[best]) best = i;
  return best;
}

// Half of all patches are at the dark end and one in two hundred at the light end, so that every model has contrast.
function fittedRange() {
  const every = Math.ceil(total / 20000);
  const sorted = cosines.filter((_, i) => i % every === 0).sort();
  const low = sorted[Math.floor(0.5 * (sorted.length - 1))];
  const high = sorted[Math.floor(0.995 * (sorted.length - 1))];
  return [low, Math.max(high, low + 0.01)];
}

function heatColour(value) {
  const share = Math.min(Math.max((value - range[0]) / (range[1] - range[0]), 0), 1) * (heat.length - 1);
  const first = Math.min(Math.floor(share), heat.length - 2);
  return heat[first].map((from, c) => from + (heat[first + 1][c] - from) * (share - first));
}

// ---- one picture with its patches over it

class View {
  constructor(number) {
    this.number = number;
    this.picture = pictures[number];
    const { key, rows, columns, jpeg } = this.picture;
    this.figure = make("figure");
    this.figure.style.setProperty("--aspect", columns / rows);
    this.frame = make("div", "frame");
    this.frame.tabIndex = 0;
    this.frame.setAttribute("role", "button");
    this.frame.setAttribute("aria-label", `${key}: arrows go from patch to patch, Enter chooses`);
    const image = make("img");
    image.src = `data:image/jpeg;base64,${jpeg}`;
    image.alt = "";
    this.canvas = make("canvas");
    this.canvas.width = columns;
    this.canvas.height = rows;
    this.best = make("i", "best");
    this.cursor = make("i", "cursor");
    this.best.hidden = this.cursor.hidden = true;
    this.frame.append(image, this.canvas, this.best, this.cursor);
    this.score = make("output");
    const name = make("span", "name", key);
    name.title = key;
    this.alike = make("button", "", "similar pictures");
    this.alike.type = "button";
    this.alike.addEventListener("click", () => choose({ picture: number }));
    this.caption = make("figcaption");
    this.caption.append(this.score, name, this.alike);
    this.figure.append(this.frame, this.caption);
    this.listen();
  }

  listen() {
    const { frame } = this;
    frame.addEventListener("click", (event) => choose({ picture: this.number, ...this.under(event) }));
    frame.addEventListener("pointermove", (event) => this.point(this.under(event)));
    frame.addEventListener("pointerleave", () => this.leave());
    frame.addEventListener("blur", () => this.leave());
    frame.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
      const at = this.at ?? this.start();
      if (event.key in moves) {
        const [down, right] = moves[event.key];
        const { rows, columns } = this.picture;
        const moved = this.at ? { row: at.row + down, column: at.column + right } : at;
        this.point({ row: within(moved.row, rows), column: within(moved.column, columns) });
      } else if (event.key === "Enter" || event.key === " ") {
        choose({ picture: this.number, ...at });
      } else return;
      event.preventDefault();
    });
  }

  // Where the keyboard begins: at the patch that is outlined.
  start() {
    const { first, rows, columns } = this.picture;
    if (!cosines) return { row: rows >> 1, column: columns >> 1 };
    const best = bestPatch(this.picture) - first;
    return { row: Math.floor(best / columns), column: best % columns };
  }

  under(event) {
    const box = this.frame.getBoundingClientRect();
    const { rows, columns } = this.picture;
    return {
      row: within(Math.floor(((event.clientY - box.top) / box.height) * rows), rows),
      column: within(Math.floor(((event.clientX - box.left) / box.width) * columns), columns),
    };
  }

  point(at) {
    this.at = at;
    this.place(this.cursor, at);
    const value = cosines ? `${figure(cosines[this.index(at)], 3)} · ` : "";
    tip.textContent = `${value}row ${at.row + 1}, column ${at.column + 1}`;
    tip.hidden = false;
    const patch = this.cursor.getBoundingClientRect();
    tip.style.left = `${within(patch.right + 6, innerWidth - tip.offsetWidth)}px`;
    tip.style.top = `${Math.max(patch.top - tip.offsetHeight - 4, 0)}px`;
  }

  leave() {
    this.at = null;
    this.cursor.hidden = tip.hidden = true;
  }

  index({ row, column }) {
    return this.picture.first + row * this.picture.columns + column;
  }

  place(mark, { row, column }) {
    const { rows, columns } = this.picture;
    Object.assign(mark.style, {
      left: `${(100 * column) / columns}%`,
      top: `${(100 * row) / rows}%`,
      width: `${100 / columns}%`,
      height: `${100 / rows}%`,
    });
    mark.hidden = false;
  }

  draw(score) {
    const show = shown();
    const { first, rows, columns } = this.picture;
    this.score.textContent = score;
    this.figure.classList.toggle("is-chosen", this.number === choice.picture);
    this.canvas.hidden = show === "nothing";
    this.best.hidden = !cosines;
    if (cosines) this.place(this.best, this.start());
    if (this.canvas.hidden) return;
    const drawn = new ImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      const patch = first + i;
      const colour = show === "heat" ? heatColour(cosines[patch]) : [0, 1, 2].map((c) => colours[c * total + patch]);
      drawn.data.set([...colour, 255], 4 * i);
    }
    this.canvas.getContext("2d").putImageData(drawn, 0, 0);
  }
}

// There is no heat without a chosen patch.
function shown() {
  const asked = bar.elements.show.value;
  return asked === "heat" && !cosines ? "nothing" : asked;
}

// ---- the page

// The address remembers a choice, so Back takes it back, and a link leads to it.
function choose({ picture, row, column }) {
  location.hash = row === undefined ? `picture-${picture + 1}` : `patch-${picture + 1}-${row + 1}-${column + 1}`;
}

function read() {
  const [kind, ...numbers] = location.hash.slice(1).split("-");
  const [number, row, column] = numbers.map((text) => Number.parseInt(text, 10) - 1);
  const picture = pictures[number];
  if (kind === "picture" && picture) return { picture: number };
  if (kind === "patch" && row >= 0 && row < picture?.rows && column >= 0 && column < picture.columns) {
    return { picture: number, row, column };
  }
  return { picture: 0, row: pictures[0].rows >> 1, column: pictures[0].columns >> 1 }; // so that a first look shows it
}

function follow() {
  choice = read();
  const { first, columns } = pictures[choice.picture];
  cosines = choice.row === undefined ? null : cosinesWith(first + choice.row * columns + choice.column);
  render();
  if (bar.elements.order.value === "best" && main.getBoundingClientRect().top < 0) main.scrollIntoView();
}

function render() {
  const scores = pictures.map((picture, p) =>
    cosines ? cosines[bestPatch(picture)] : cls[choice.picture * pictures.length + p] / 32767,
  );
  if (cosines) range = bar.elements.scale.value === "fixed" ? [0, 1] : fittedRange();
  document.body.dataset.show = shown();
  document.body.style.setProperty("--strength", bar.elements.strength.value / 100);
  const order = pictures.map((_, p) => p);
  if (bar.elements.order.value === "best") {
    // The chosen picture itself comes first, among copies too.
    order.sort((a, b) => (b === choice.picture) - (a === choice.picture) || scores[b] - scores[a] || a - b);
  }
  for (const view of views) view.draw(figure(scores[view.number], 2));
  arrange(order);
  renderChosen();
  tell(scores);
}

function arrange(order) {
  const focused = document.activeElement;
  document.getElementById("tiles").append(...order.map((p) => views[p].figure));
  if (focused !== document.activeElement) focused.focus({ preventScroll: true }); // moving took it away
}

function renderChosen() {
  const place = document.getElementById("chosen");
  if (chosenView?.number !== choice.picture) {
    chosenView = new View(choice.picture);
    place.replaceChildren(chosenView.figure, make("div", "legend"));
  }
  chosenView.draw("");
  const legend = place.lastChild;
  const ends = range.map((value) => figure(value, 2));
  const scale = make("div", "scale");
  scale.style.backgroundImage = `linear-gradient(to right, ${heat.map((colour) => `rgb(${colour})`)})`;
  const [below, above] = bar.elements.scale.value === "fitted" ? ["≤ ", "≥ "] : ["", ""];
  const words = [below + ends[0], "cosine with the chosen patch", above + ends[1]];
  legend.replaceChildren(scale, ...words.map((text) => make("span", "", text)));
  legend.hidden = shown() !== "heat";
}

function tell(scores) {
  const others = pictures.map((_, p) => p).filter((p) => p !== choice.picture);
  const best = others.reduce((a, b) => (scores[b] > scores[a] ? b : a), others[0]);
  const name = (p) => make("bdi", "", pictures[p].key); // a name may turn the direction of writing
  const told = [cosines ? `Patch in row ${choice.row + 1}, column ${choice.column + 1} of ` : "Pictures like "];
  told.push(name(choice.picture));
  told.push(...(others.length ? [". Most alike elsewhere: ", name(best), `, ${figure(scores[best], 3)}.`] : ["."]));
  document.getElementById("told").replaceChildren(...told);
}

function make(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function figure(value, digits) {
  return value.toFixed(digits).replace("-", "\u2212");
}

function within(number, count) {
  return Math.min(Math.max(number, 0), count - 1);
}

async function begin() {
  const [a, b, c] = await Promise.all(["patches", "colours", "cls"].map(unpacked));
  patches = new Int8Array(a);
  colours = new Uint8Array(b);
  cls = new Int16Array(c);
  views.push(...pictures.map((_, p) => new View(p)));
  main.hidden = false;
  follow();
  addEventListener("hashchange", follow);
  bar.addEventListener("input", render);
  bar.addEventListener("submit", (event) => event.preventDefault());
}

begin();
