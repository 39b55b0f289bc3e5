"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (name) => { root.dataset.theme = name; };
  setTheme(dark.matches ? "dark" : "light");

  // Colours in a figure are names of CSS variables: what they are now is looked up when it is drawn.
  const drawn = new Set();
  const resolved = (text) => {
    const style = getComputedStyle(root);
    return JSON.parse(text, (_, value) =>
      typeof value === "string" && value.startsWith("var(")
        ? style.getPropertyValue(value.slice(4, -1)).trim()
        : value === "inherit" ? getComputedStyle(document.body).fontFamily : value);
  };
  const draw = (plot) => {
    const { data, layout } = resolved(plot.figure);
    return Plotly.react(plot, data, layout, {
      responsive: true, displayModeBar: false,
    });
  };
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      drawn.add(target);
      draw(target);
    }
  }, { rootMargin: "800px" });
  for (const plot of document.querySelectorAll(".plot")) {
    const script = plot.querySelector("script");
    plot.figure = script.textContent;
    script.remove();
    seen.observe(plot);
  }
  const redraw = () => drawn.forEach(draw);
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(root.dataset.theme === "dark" ? "light" : "dark");
    redraw();
  });
  dark.addEventListener("change", (event) => { setTheme(event.matches ? "dark" : "light"); redraw(); });

  const compared = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");  // what is missing comes last
    const difference = Number(a) - Number(b);
    return Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference;
  };
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const header = button.parentElement;
      const up = header.getAttribute("aria-sort") !== "ascending";
      for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = header.closest("table").tBodies[0];
      const value = (row) => row.cells[header.cellIndex].dataset.value;
      const rows = [...body.rows].sort((a, b) => {
        const missing = value(a) === "" || value(b) === "";
        return compared(value(a), value(b)) * (up || missing ? 1 : -1);
      });
      body.append(...rows);
    });
  }
})();
