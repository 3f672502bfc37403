"""The script of the HTML reports: sorting, picking a curve out of many, and the slider.

Without it the pages still show everything but the slider. Text from data enters by `textContent`
alone, so no name can become markup.
"""

SCRIPT = """
"use strict";
const all = (root, query) => [...root.querySelectorAll(query)];
const data = (figure) => JSON.parse(figure.querySelector("script.data").textContent);
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

for (const figure of all(document, "figure.drawn")) {
  const marks = all(figure, "[data-mark]");
  for (const mark of marks) {
    const light = (on) => {
      figure.classList.toggle("some", on);
      for (const other of marks)
        other.classList.toggle("on", other.dataset.mark === mark.dataset.mark);
    };
    mark.addEventListener("pointerenter", () => light(true));
    mark.addEventListener("pointerleave", () => light(false));
  }
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
