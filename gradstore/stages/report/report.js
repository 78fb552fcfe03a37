"use strict";
// The page is whole without this script; it shows one query at a time, steps through them, and draws the parts of scores.
(() => {
  document.documentElement.classList.add("js");

  const SVG = "http://www.w3.org/2000/svg";
  const make = (name, attributes = {}, children = []) => {
    const element = ["svg", "rect", "path"].includes(name) ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const format = (value) => {
    const size = value ? Math.floor(Math.log10(Math.abs(value))) : 0;
    const digits = Math.abs(value).toFixed(Math.min(Math.max(1 - size, 0), 4));
    return (value < 0 ? "\u2212" : "+") + digits;
  };
  const read = (details) => {
    const [unit, depths, functions] = details.dataset.parts.split("|");
    const numbers = (list) => list.split(",").map((whole) => whole * unit);
    return { depths: numbers(depths), functions: numbers(functions) };
  };
  // The vertical span of bars that may point both ways, so that zero stands where both fit.
  const span = (values) => [Math.max(0, ...values), Math.min(0, ...values)];

  function spark(details) {
    const { depths } = read(details);
    const [high, low] = span(depths);
    const height = (value) => (20 * Math.abs(value)) / (high - low || 1);
    const zero = height(high);
    const bars = { above: "", below: "" };
    depths.forEach((value, index) => {
      const y = value < 0 ? zero : zero - height(value);
      bars[value < 0 ? "below" : "above"] += `M${index + 0.1} ${y.toFixed(1)}h.8v${height(value).toFixed(1)}h-.8z`;
    });
    const svg = make("svg", { class: "spark", viewBox: `0 -1 ${depths.length} 22`, preserveAspectRatio: "none", "aria-hidden": "true" });
    svg.append(make("rect", { class: "base", width: depths.length, height: 0.6, y: zero - 0.3 }));
    for (const name of ["above", "below"]) svg.append(make("path", { class: name, d: bars[name] }));
    details.querySelector("summary").append(svg);
  }

  function byDepth(values, labels, axis) {
    const [high, low] = span(values);
    const height = (value) => (100 * Math.abs(value)) / (high - low || 1);
    const svg = make("svg", { class: "bars", height: 90, role: "img" });
    svg.append(make("rect", { class: "base", width: "100%", height: 1, y: `${height(high)}%` }));
    values.forEach((value, index) => {
      const width = 100 / values.length;
      svg.append(make("rect", {
        class: value < 0 ? "below" : "above", x: `${(index + 0.1) * width}%`, width: `${0.8 * width}%`,
        y: `${height(high) - (value < 0 ? 0 : height(value))}%`, height: `${height(value)}%`,
        "data-tip": `${axis} ${labels[index]}: ${format(value)}`,
      }));
    });
    const peak = values.reduce((best, value, index) => (Math.abs(value) > Math.abs(values[best]) ? index : best), 0);
    svg.setAttribute("aria-label", `Sums of parts by ${axis}; the largest is ${format(values[peak])} at ${labels[peak]}`);
    const ends = make("div", { class: "ends" }, [make("span", {}, [labels[0]]), make("span", {}, [labels.at(-1)])]);
    return make("div", {}, [make("h5", {}, [`By ${axis}`]), svg, ends]);
  }

  function byFunction(values) {
    const [high, low] = span(values);
    const width = (value) => (100 * Math.abs(value)) / (high - low || 1);
    const list = make("dl");
    const names = document.querySelectorAll("#functions li");
    values.forEach((value, index) => {
      const zero = width(low);
      const svg = make("svg", { height: 10, "aria-hidden": "true" }, [
        make("rect", { class: value < 0 ? "below" : "above", height: 10, width: `${width(value)}%`, x: `${value < 0 ? zero - width(value) : zero}%` }),
        make("rect", { class: "base", width: 1, height: 10, x: `${zero}%` }),
      ]);
      const name = make("dt", {}, [...names[index].cloneNode(true).childNodes]);
      name.title = name.textContent;
      list.append(name, make("dd", {}, [svg]), make("dd", { class: "value" }, [format(value)]));
    });
    return make("div", {}, [make("h5", {}, ["By function"]), list]);
  }

  function drawLayers(details, place) {
    const { depths, functions } = read(details);
    const layers = make("div", { class: "layers" }, [byFunction(functions), byDepth(depths, place.depths.split(","), place.axis)]);
    details.querySelector(".strongest").before(layers);
  }

  function sparks(article) {
    for (const details of article.querySelectorAll("details[data-parts]")) {
      if (!details.querySelector(".spark")) spark(details);
    }
  }

  function parts() {
    const place = document.getElementById("queries").dataset;
    sparks(document.querySelector(".query.current"));
    document.addEventListener("toggle", ({ target }) => {
      if (target.matches("details[data-parts]") && target.open && !target.querySelector(".layers")) drawLayers(target, place);
    }, true);
  }

  function browse() {
    const articles = [...document.querySelectorAll(".query")];
    const links = [...document.querySelectorAll("nav a")];
    const picker = document.querySelector(".picker");
    const choose = document.getElementById("choose");
    const filter = document.getElementById("filter");
    const wide = matchMedia("(min-width: 1000px)");
    let current = 0;

    const open = (opened) => {
      picker.classList.toggle("open", opened);
      choose.setAttribute("aria-expanded", opened);
    };
    function show(index) {
      articles[current].classList.remove("current");
      links[current].removeAttribute("aria-current");
      current = index;
      const article = articles[current];
      article.classList.add("current");
      links[current].setAttribute("aria-current", "true");
      document.getElementById("position").textContent = current + 1;
      sparks(article);
      const list = document.getElementById("list");
      const item = links[current].parentElement;
      const above = item.offsetTop - list.offsetTop;
      if (above < list.scrollTop || above + item.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = above - 80;
    }
    function go(index) {
      if (index < 0 || index >= articles.length) return;
      history.pushState(null, "", `#query-${index + 1}`);
      show(index);
      open(false);
      const top = articles[index].getBoundingClientRect().top;
      if (top < 0 || top > innerHeight / 2) document.getElementById("queries").scrollIntoView();
    }
    const fromAddress = () => {
      const index = articles.findIndex((article) => `#${article.id}` === location.hash);
      if (index >= 0) show(index);
      return index >= 0;
    };

    links.forEach((link, index) => link.addEventListener("click", (event) => { event.preventDefault(); go(index); }));
    document.getElementById("previous").addEventListener("click", () => go(current - 1));
    document.getElementById("next").addEventListener("click", () => go(current + 1));
    choose.addEventListener("click", () => open(!picker.classList.contains("open")));
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toLowerCase();
      for (const link of links) link.parentElement.hidden = !link.textContent.toLowerCase().includes(wanted);
    });
    addEventListener("popstate", fromAddress);
    addEventListener("keydown", (event) => {
      if (event.key === "Escape") open(false);
      if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target.closest("input")) return;
      if (event.key === "ArrowLeft") go(current - 1);
      if (event.key === "ArrowRight") go(current + 1);
    });
    // On a wide screen the list is always in sight: its button only tells the position.
    const fit = () => { choose.disabled = wide.matches; open(false); };
    wide.addEventListener("change", fit);
    fit();
    if (fromAddress()) document.getElementById("queries").scrollIntoView();
    else show(0);
  }

  // The same example in the lists beside.
  function twins() {
    let marked = [];
    const mark = ({ target }) => {
      for (const item of marked) item.classList.remove("twin");
      const item = target.closest?.(".ranked > li");
      const name = item?.querySelector(".id").textContent;
      const all = item ? [...item.closest(".side").querySelectorAll(".ranked > li")] : [];
      marked = all.filter((other) => other !== item && other.querySelector(".id").textContent === name);
      for (const twin of marked) twin.classList.add("twin");
    };
    document.addEventListener("pointerover", mark);
    document.addEventListener("focusin", mark);
  }

  // Titles appear at once under a finger or a pointer; the element keeps the title as its accessible name.
  function tips() {
    const tip = make("div", { class: "tip", hidden: "" });
    document.body.append(tip);
    document.addEventListener("pointerover", ({ target, clientX, clientY }) => {
      const title = target.querySelector?.(":scope > title");
      if (title) {
        target.dataset.tip = title.textContent;
        target.setAttribute("aria-label", title.textContent);
        title.remove();
      }
      tip.hidden = !target.dataset?.tip;
      if (tip.hidden) return;
      tip.textContent = target.dataset.tip;
      tip.style.left = `${Math.max(4, Math.min(clientX + 12, innerWidth - tip.offsetWidth - 4))}px`;
      tip.style.top = `${Math.max(4, clientY - tip.offsetHeight - 12)}px`;
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    if (document.querySelector(".query")) parts();
    if (document.querySelector(".picker")) browse();
    twins();
    tips();
  });
})();
