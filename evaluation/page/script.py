"""The script of the HTML reports: sorting, reading values off figures, and the slider.

Without it the pages still show everything but the slider. Text from data enters by `textContent`
alone, so no name can become markup.
"""

SCRIPT = """
"use strict";
const all = (root, query) => [...root.querySelectorAll(query)];
const make = (tag, css, text) => {
  const made = document.createElement(tag);
  if (css) made.className = css;
  if (text !== undefined) made.textContent = text;
  return made;
};
const data = (figure) => JSON.parse(figure.querySelector("script.data").textContent);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

for (const button of all(document, "th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table");
    const down = head.getAttribute("aria-sort") !== "descending";
    const body = table.tBodies[0], column = head.cellIndex;
    const value = (row) => row.cells[column].dataset.value;
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -difference : difference;
    };
    for (const other of all(table, "th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort(order));
  });
}

function place(tip, canvas, x, y) {
  const width = canvas.clientWidth, gap = 14;
  tip.hidden = false;
  const right = x + gap + tip.offsetWidth <= width;
  const left = right ? x + gap : x - gap - tip.offsetWidth;
  tip.style.left = clamp(left, Math.min(0, width - tip.offsetWidth), width) + "px";
  tip.style.top = clamp(y - tip.offsetHeight / 2, -10, canvas.clientHeight) + "px";
}

function reader(canvas, label, show, hide, move) {
  const box = () => canvas.getBoundingClientRect();
  const at = (event) => {
    const size = box();
    show((event.clientX - size.left) / size.width, (event.clientY - size.top) / size.height);
  };
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "group");
  canvas.setAttribute("aria-label", label + " Arrow keys read the values.");
  canvas.addEventListener("pointermove", at);
  canvas.addEventListener("pointerdown", at);
  canvas.addEventListener("pointerleave", hide);
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Escape") hide();
    if (!step[event.key]) return;
    event.preventDefault();
    move(...step[event.key]);
  });
}

for (const figure of all(document, "figure.chart")) {
  const canvas = figure.querySelector(".canvas"), told = data(figure);
  const marks = all(figure, ".canvas .mark");
  const cursor = make("div", "cursor"), tip = make("div", "tip");
  tip.setAttribute("aria-live", "polite");
  cursor.hidden = tip.hidden = true;
  canvas.append(cursor, tip);
  let index = -1;
  const picked = new Set();
  const light = (chosen) => {
    figure.classList.toggle("some", chosen.size > 0);
    for (const mark of marks) mark.classList.toggle("on", chosen.has(+mark.dataset.curve));
  };
  const show = (x, y) => {
    const gaps = told.places.map((place) => Math.abs(place - x));
    index = gaps.indexOf(Math.min(...gaps));
    const rows = told.curves.map((curve, number) => ({ ...curve, number,
      value: curve.y[index], height: curve.heights[index] }))
      .filter((row) => row.value !== null && (!picked.size || picked.has(row.number)))
      .sort((a, b) => a.height - b.height);
    const off = rows.map((row) => Math.abs(row.height - y));
    const near = rows[off.indexOf(Math.min(...off))];
    tip.replaceChildren(make("b", "", told.x_name + " " + told.x[index]));
    const first = clamp(rows.indexOf(near) - 5, 0, Math.max(0, rows.length - 11));
    for (const row of rows.slice(first, first + 11)) {
      const line = make("div", row === near ? "near" : "");
      line.append(make("span", row.css, row.label), make("span", "", row.shown[index]));
      line.lastChild.className = "number";
      tip.append(line);
    }
    if (rows.length > 11) tip.append(make("div", "soft", rows.length - 11 + " more"));
    cursor.hidden = false;
    cursor.style.left = 100 * told.places[index] + "%";
    place(tip, canvas, told.places[index] * canvas.clientWidth, y * canvas.clientHeight);
    if (!picked.size && near) light(new Set([near.number]));
  };
  const hide = () => {
    cursor.hidden = tip.hidden = true;
    light(picked);
  };
  reader(canvas, told.label, show, hide, (right) => {
    index = clamp(index + right, 0, told.x.length - 1);
    show(told.places[index], 0.5);
  });
  for (const button of all(figure, ".legend button")) {
    const number = +button.dataset.curve;
    button.addEventListener("click", () => {
      if (!picked.delete(number)) picked.add(number);
      button.setAttribute("aria-pressed", picked.has(number));
      light(picked);
    });
    button.addEventListener("pointerenter", () => light(new Set([...picked, number])));
    button.addEventListener("pointerleave", () => light(picked));
  }
}

for (const figure of all(document, "figure.heat")) {
  const canvas = figure.querySelector(".canvas"), told = data(figure);
  const cell = make("div", "cell"), tip = make("div", "tip");
  tip.setAttribute("aria-live", "polite");
  cell.hidden = tip.hidden = true;
  canvas.append(cell, tip);
  let row = -1, column = -1;
  const show = (x, y) => {
    row = clamp(Math.floor(y * told.rows.length), 0, told.rows.length - 1);
    column = clamp(Math.floor(x * told.columns.length), 0, told.columns.length - 1);
    const width = 100 / told.columns.length, height = 100 / told.rows.length;
    Object.assign(cell.style, { left: column * width + "%", top: row * height + "%",
      width: width + "%", height: height + "%" });
    const value = told.values[row][column];
    tip.replaceChildren(
      make("b", "", value === null ? "none" : value),
      make("div", "", told.row_name + " " + told.rows[row]),
      make("div", "", told.column_name + " " + told.columns[column]));
    cell.hidden = false;
    place(tip, canvas, (column + 1) * width / 100 * canvas.clientWidth,
      (row + 0.5) * height / 100 * canvas.clientHeight);
  };
  const hide = () => { cell.hidden = tip.hidden = true; };
  reader(canvas, told.label, show, hide, (right, down) => {
    row = clamp(row + down, 0, told.rows.length - 1);
    column = clamp(column + right, 0, told.columns.length - 1);
    show((column + 0.5) / told.columns.length, (row + 0.5) / told.rows.length);
  });
}

for (const figure of all(document, "figure.samples")) {
  const told = data(figure), stage = figure.querySelector(".stage");
  const [under, over] = all(stage, "img"), range = stage.querySelector("input");
  const chooser = figure.querySelector("select"), score = figure.querySelector(".score");
  const names = all(figure, ".ends span"), note = figure.querySelector(".note");
  let sample = 0;
  const draw = () => {
    const method = told.methods[chooser.value];
    under.src = told.full.images[sample];
    over.src = method.images[sample];
    under.alt = told.full.label + ", sample " + (sample + 1);
    over.alt = method.label + ", sample " + (sample + 1);
    names[1].textContent = method.label;
    score.textContent = method.psnr[sample];
    note.textContent = "PSNR of " + method.label + " on sample " + (sample + 1) +
      " against the " + told.full.label + "; mean of the " + told.full.images.length +
      " samples: " + method.mean;
  };
  const slide = () => {
    stage.style.setProperty("--x", range.value + "%");
    range.setAttribute("aria-valuetext", range.value + " % " + told.full.label);
  };
  range.addEventListener("input", slide);
  chooser.addEventListener("change", draw);
  figure.querySelector("[type=checkbox]").addEventListener("change", (event) =>
    stage.classList.toggle("differs", event.target.checked));
  for (const button of all(figure, ".thumbs button")) {
    button.addEventListener("click", () => {
      sample = +button.dataset.sample;
      for (const other of all(figure, ".thumbs button"))
        other.setAttribute("aria-pressed", other === button);
      draw();
    });
  }
  draw();
  slide();
}
"""
