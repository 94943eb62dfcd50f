"use strict";
(() => {
  document.documentElement.classList.add("js");
  const veils = [...document.querySelectorAll(".veil")];

  const set = (veil, shown) => {
    veil.setAttribute("aria-pressed", String(shown));
    veil.querySelector(".cover").textContent = shown ? "blur" : "show";
  };
  const blurAll = () => veils.forEach((veil) => set(veil, false));

  for (const veil of veils) {
    set(veil, false);
    veil.addEventListener("click", () => set(veil, veil.getAttribute("aria-pressed") !== "true"));
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") blurAll();
  });

  for (const gallery of document.querySelectorAll(".gallery")) {
    const rows = [...gallery.querySelectorAll(".row")];
    const filters = [...gallery.querySelectorAll("[data-filter]")];
    const status = gallery.querySelector(".status");
    gallery.querySelector(".controls").hidden = false;
    gallery.querySelector(".blur-all")?.addEventListener("click", () => {
      blurAll();
      status.textContent = "All images of unsafe prompts are blurred.";
    });
    for (const button of filters) {
      button.addEventListener("click", () => {
        const wanted = button.dataset.filter;
        for (const row of rows) row.hidden = wanted !== "all" && row.dataset[wanted] !== "yes";
        for (const other of filters) other.setAttribute("aria-pressed", String(other === button));
        const shown = rows.filter((row) => !row.hidden).length;
        status.textContent = `${shown} of ${rows.length} prompts shown`;
      });
    }
  }
})();
