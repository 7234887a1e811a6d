"use strict";
// Draws the matrices of the JSON beside it. Labels reach the page as text only, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const [SEES, FUTURE, WINDOW, DOCUMENT, PADDING] = [0, 1, 2, 3, 4];
const part = (id) => document.getElementById(id);
const frame = part("frame"), field = part("field"), cells = part("cells"), cursor = part("cursor");
const SMALLEST = 2, LARGEST = 40, COMFORTABLE = 16;
let panel, tokens, cell, at = null, colours;

function decoded(base64, Kind) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Kind(bytes.buffer);
}
for (const each of data.panels) {
  each.reasons = decoded(each.reasons, Uint8Array);
  if (each.weights !== null) each.weights = decoded(each.weights, Uint16Array);
}

// Colours

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue("--" + name).trim();
  const rgb = (name) => [1, 3, 5].map((i) => parseInt(value(name).slice(i, i + 2), 16));
  colours = { of: ["sees", "future", "window", "document", "padding"].map(value), self: value("self"),
    paper: value("paper"), scale: [0, 1, 2].map((i) => rgb("weight-" + i)) };
}
function weightColour(weight) {
  const place = 2 * Math.sqrt(weight), first = place < 1 ? 0 : 1;
  const mix = (i) => Math.round(colours.scale[first][i] + (colours.scale[first + 1][i] - colours.scale[first][i]) * (place - first));
  return `rgb(${mix(0)},${mix(1)},${mix(2)})`;
}

// Cells

function drawReason(pen, reason, itself, x, y, size) {
  pen.fillStyle = pen.strokeStyle = colours.of[reason];
  pen.lineWidth = Math.max(1, size / 10);
  const gap = size >= 6 ? Math.max(1, size / 16) : 0, side = size - 2 * gap;
  if (reason === SEES) {
    if (itself) pen.fillStyle = colours.self;
    pen.fillRect(x + gap, y + gap, side, side);
  } else if (reason === FUTURE) {
    const dot = Math.max(1, size / 7);
    if (size >= 5) pen.fillRect(x + (size - dot) / 2, y + (size - dot) / 2, dot, dot);
  } else if (size < 6) {
    pen.globalAlpha = reason === PADDING ? 0.3 : 0.6;
    pen.fillRect(x, y, size, size);
    pen.globalAlpha = 1;
  } else {
    drawMark(pen, reason, x + gap, y + gap, side);
  }
}
function drawMark(pen, reason, x, y, side) {  // shapes too, for who sees no colours
  pen.save();
  pen.beginPath();
  pen.rect(x, y, side, side);
  pen.clip();
  pen.beginPath();
  if (reason === PADDING) {
    pen.globalAlpha = 0.7;
    pen.moveTo(x + side * 0.3, y + side * 0.3); pen.lineTo(x + side * 0.7, y + side * 0.7);
    pen.moveTo(x + side * 0.7, y + side * 0.3); pen.lineTo(x + side * 0.3, y + side * 0.7);
  } else {
    pen.globalAlpha = 0.22;
    pen.fillRect(x, y, side, side);
    pen.globalAlpha = 1;
    const step = side / 2;
    for (let i = -1; i <= 1; i++) {
      if (reason === WINDOW) { pen.moveTo(x + i * step, y + side); pen.lineTo(x + i * step + side, y); }
      else { pen.moveTo(x + (i + 1) * step, y); pen.lineTo(x + (i + 1) * step, y + side); }
    }
  }
  pen.stroke();
  pen.restore();
}
function drawCell(pen, of, query, key, x, y, size) {
  const index = query * of.size + key, reason = of.reasons[index];
  if (of.weights === null) return drawReason(pen, reason, query === key, x, y, size);
  if (reason !== SEES) return drawReason(pen, FUTURE, false, x, y, size);
  const gap = size >= 8 ? 0.5 : 0;
  pen.fillStyle = weightColour(of.weights[index] / 65535);
  pen.fillRect(x + gap, y + gap, size - 2 * gap, size - 2 * gap);
}
function drawVisible() {  // the canvas stays in view and is as large as the view, however many tokens there are
  const side = cell * tokens.length, left = part("rows").offsetWidth, top = part("columns").offsetHeight;
  const width = Math.min(side, frame.clientWidth - left), height = Math.min(side, frame.clientHeight - top);
  const sharp = window.devicePixelRatio || 1, x = frame.scrollLeft, y = frame.scrollTop;
  cells.width = Math.round(width * sharp);
  cells.height = Math.round(height * sharp);
  Object.assign(cells.style, { left: left + "px", top: top + "px", width: width + "px", height: height + "px" });
  const pen = cells.getContext("2d");
  pen.setTransform(sharp, 0, 0, sharp, -x * sharp, -y * sharp);
  const last = (end) => Math.min(tokens.length, Math.ceil(end / cell));
  for (let query = Math.floor(y / cell); query < last(y + height); query++)
    for (let key = Math.floor(x / cell); key < last(x + width); key++)
      drawCell(pen, panel, query, key, key * cell, query * cell, cell);
}
function drawAll(canvas, of, size) {
  canvas.width = canvas.height = Math.round(of.size * size);
  const pen = canvas.getContext("2d");
  for (let query = 0; query < of.size; query++)
    for (let key = 0; key < of.size; key++) drawCell(pen, of, query, key, key * size, query * size, size);
}

// Layout

function label(token, size, shown) {
  const element = document.createElement("div");
  element.className = "label" + (token.control ? " control" : "") + (token.position === null ? " padding" : "");
  element.title = token.name;
  if (!shown) return element;
  const text = document.createElement("bdi"), number = document.createElement("i");
  text.textContent = token.label;
  number.textContent = token.position === null ? "" : token.position;
  element.append(text, number);
  element.style.fontSize = Math.min(13, Math.max(9, size - 2)) + "px";
  return element;
}
function layOut() {
  const every = Math.ceil(11 / cell);  // one label in so many, so that they do not touch
  for (const [holder, side] of [[part("rows"), "height"], [part("columns"), "width"]]) {
    holder.replaceChildren(...tokens.map((token, i) => label(token, cell * every, i % every === 0)));
    [...holder.children].forEach((element, i) => {
      const span = Math.min(every, tokens.length - i);
      element.style[side] = cell * (i % every === 0 ? span : 0) + "px";
      element.hidden = i % every !== 0;
    });
  }
  field.style.width = field.style.height = cell * tokens.length + "px";
  drawVisible();
  point(at);
}
function fitting() {
  const room = document.body.clientWidth - 32 - Math.min(180, 0.38 * window.innerWidth);
  return Math.max(SMALLEST, Math.min(28, Math.floor(room / tokens.length)));
}
function zoom(size) {
  cell = Math.max(SMALLEST, Math.min(LARGEST, size));
  layOut();
}
function choose(index) {
  panel = data.panels[index];
  const same = tokens === data.texts[panel.row];
  tokens = data.texts[panel.row];
  if (!same) at = null;
  part("panel").textContent = panel.title;
  [...part("picker").children].forEach((button, i) => button.setAttribute("aria-pressed", i === index));
  zoom(same ? cell : Math.max(fitting(), COMFORTABLE));
}

// Explanations

function sentence(query, key) {
  const index = query * panel.size + key, reason = panel.reasons[index];
  const weighed = panel.weights !== null && reason === SEES, itself = query === key;
  const template = weighed ? data.weight : reason === SEES && itself ? data.self : data.sentences[reason];
  const values = {
    query: tokens[query].name, key: weighed && itself ? "itself" : tokens[key].name, window: panel.window,
    distance: tokens[query].position - tokens[key].position,
    weight: weighed ? (panel.weights[index] / 65535).toFixed(4) : "",
  };
  return template.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
function point(place) {
  at = place;
  for (const element of frame.querySelectorAll(".label.at")) element.classList.remove("at");
  cursor.hidden = at === null;
  if (at === null) return;
  const [query, key] = at;
  Object.assign(cursor.style, { left: key * cell - 1 + "px", top: query * cell - 1 + "px",
    width: cell + 2 + "px", height: cell + 2 + "px" });
  part("rows").children[query].classList.add("at");
  part("columns").children[key].classList.add("at");
  part("says").textContent = sentence(query, key);
}
function under(event) {
  const box = field.getBoundingClientRect(), last = tokens.length - 1;
  const place = (offset) => Math.max(0, Math.min(last, Math.floor(offset / cell)));
  return [place(event.clientY - box.top), place(event.clientX - box.left)];
}
function reveal() {
  const left = part("rows").offsetWidth, top = part("columns").offsetHeight, [query, key] = at;
  const x = key * cell, y = query * cell;
  if (x < frame.scrollLeft) frame.scrollLeft = x;
  if (y < frame.scrollTop) frame.scrollTop = y;
  if (x + cell + left > frame.scrollLeft + frame.clientWidth) frame.scrollLeft = x + cell + left - frame.clientWidth;
  if (y + cell + top > frame.scrollTop + frame.clientHeight) frame.scrollTop = y + cell + top - frame.clientHeight;
}
const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
  Home: [0, -Infinity], End: [0, Infinity], PageUp: [-10, 0], PageDown: [10, 0] };
frame.addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  if (move === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const last = tokens.length - 1, inside = (i) => Math.max(0, Math.min(last, i));
  point(at === null ? [0, 0] : [inside(at[0] + move[0]), inside(at[1] + move[1])]);
  reveal();
});
field.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") point(under(event)); });
field.addEventListener("click", (event) => point(under(event)));
frame.addEventListener("scroll", () => requestAnimationFrame(drawVisible));
window.addEventListener("resize", drawVisible);
part("smaller").addEventListener("click", () => zoom(cell > 16 ? cell - 4 : cell - 2));
part("larger").addEventListener("click", () => zoom(cell < 16 ? cell + 2 : cell + 4));
part("fit").addEventListener("click", () => zoom(fitting()));

// Picker and legend

function drawSmall() {
  [...part("picker").children].forEach((button, i) => {
    const of = data.panels[i];
    drawAll(button.firstChild, of, Math.max(1, Math.min(8, Math.floor(144 / of.size))));
  });
  for (const canvas of part("legend").querySelectorAll("canvas")) {
    canvas.width = canvas.height = 36;
    drawReason(canvas.getContext("2d"), Number(canvas.dataset.reason), canvas.dataset.self === "1", 0, 0, 36);
  }
  for (const step of part("legend").querySelectorAll("b"))
    step.style.setProperty("--at", weightColour(Number(step.textContent)));
}
data.panels.forEach((each, index) => {
  const button = document.createElement("button"), title = document.createElement("span");
  button.type = "button";
  title.textContent = each.title;
  button.append(document.createElement("canvas"), title);
  button.addEventListener("click", () => choose(index));
  part("picker").append(button);
});
part("picker").hidden = data.panels.length < 2;
readColours();
drawSmall();
choose(0);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); drawSmall(); layOut(); });
