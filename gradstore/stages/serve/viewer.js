"use strict";
// Pages are whole without this script; keys step through the queries.
(() => {
  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target.closest("input, select, summary")) return;
    const link = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    document.querySelector(`.choose a[rel="${link}"]`)?.click();
  });
})();
