"use strict";
// What the page does beyond links and forms, which work without it: reads curves out, filters in place, follows a run.
// Whatever comes from the server was escaped there; nothing here makes markup of text.

const live = document.body.dataset.live === "true";
const find = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// --- curves: one step, read in every panel -------------------------------------------------------------------------

function readOut() {
  const slider = find("#at");
  if (!slider) return;
  const { steps, panels, axes } = JSON.parse(find("#readings").textContent);
  const first = steps[0], last = steps[steps.length - 1];

  function show() {
    let nearest = 0;
    steps.forEach((step, i) => { if (Math.abs(step - slider.value) < Math.abs(steps[nearest] - slider.value)) nearest = i; });
    find("#at-value").textContent = steps[nearest];
    const link = find("#at-episodes");
    if (link) link.href = `?from=${steps[nearest]}&to=${steps[nearest]}#asks`;
    for (const panel of all(".panel")) {
      const values = panels[panel.dataset.panel], line = find(".plot i", panel);
      if (!line) continue;
      line.style.left = `${100 * (axes[0] + axes[2] * (last > first ? (steps[nearest] - first) / (last - first) : 0))}%`;
      for (const output of all("output", panel)) {
        const value = values[output.dataset.label][nearest];
        output.textContent = value === null ? "–" : String(Number(value.toPrecision(3)));
      }
    }
    find(".panels").classList.add("reading-out");
  }

  slider.addEventListener("input", show);
  for (const plot of all(".plot")) {
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width - axes[0]) / axes[2];
      slider.value = Math.round(first + (last - first) * Math.min(1, Math.max(0, share)));
      show();
    });
  }
}

// --- episodes --------------------------------------------------------------------------------------------------------

function filterReport() {
  const form = find("#filter"), list = find("#episodes"), articles = all(".episode", list);
  const texts = new Map(articles.map((article) => [article, article.textContent.toLocaleLowerCase()]));

  function show() {
    const name = form.elements.show.value, sought = form.elements.q.value.trim().toLocaleLowerCase();
    const ranked = articles.filter((a) => name in a.dataset && texts.get(a).includes(sought));
    ranked.sort((a, b) => a.dataset[name] - b.dataset[name]);
    for (const article of articles) article.hidden = !ranked.includes(article);
    list.append(...ranked);
    find("#count").firstChild.textContent = `${ranked.length} of ${articles.length} episodes in this file. `;
  }

  form.addEventListener("submit", (event) => { event.preventDefault(); show(); });
  form.addEventListener("input", show);
  show();
}

async function fetchInto(target, address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
  target.innerHTML = await answer.text();
}

let latest = 0; // of several lists asked for, the last one counts

async function showEpisodes(query, remember = true) {
  const mine = ++latest, target = find("#episodes");
  target.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(`/part/episodes?${query}`);
    const text = await answer.text();
    if (mine !== latest || !answer.ok) return;
    target.innerHTML = text;
    if (remember) history.replaceState(null, "", `?${query}#asks`);
  } finally {
    if (mine === latest) target.removeAttribute("aria-busy");
  }
}

function followFilter() {
  const form = find("#filter");
  let stretch = form.elements.from.value + "-" + form.elements.to.value;
  const ask = () => {
    const query = new URLSearchParams(new FormData(form)).toString();
    const chosen = form.elements.from.value + "-" + form.elements.to.value;
    if (chosen !== stretch) fetchInto(find("#agreement"), `/part/agreement?${query}`).catch(() => {});
    stretch = chosen;
    return showEpisodes(query);
  };
  let typing;
  form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  form.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(ask, 250); });
  find("#episodes").addEventListener("click", (event) => {
    const link = event.target.closest(".pager a");
    if (!link) return;
    event.preventDefault();
    showEpisodes(new URL(link.href).search.slice(1)).then(() => find("#asks").scrollIntoView());
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("#at-episodes, #fresh");
    if (!link) return;
    event.preventDefault();
    const values = new URL(link.href).searchParams;
    form.elements.show.value = "newest";
    form.elements.q.value = "";
    form.elements.from.value = values.get("from") ?? "";
    form.elements.to.value = values.get("to") ?? "";
    find("#fresh").hidden = true;
    ask().then(() => find("#asks").scrollIntoView());
  });
}

// --- following a run -------------------------------------------------------------------------------------------------

async function follow() {
  let version = document.body.dataset.version, seen = null;
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, document.hidden ? 15000 : 3000));
    let pulse;
    try {
      pulse = await (await fetch("/pulse")).json();
    } catch {
      find("#state").textContent = "the viewer has stopped";
      find("#state").className = "chip stopped";
      continue;
    }
    find("#state").textContent = pulse.state;
    find("#state").className = `chip ${pulse.state.replace(" ", "-")}`;
    seen ??= pulse.episodes;
    if (pulse.version === version) continue;
    version = pulse.version;
    if (pulse.episodes !== seen) find("#fresh").hidden = false;
    seen = pulse.episodes;
    // What somebody is reading or touching is left alone until they are done.
    for (const part of ["working", "agreement", "change", "ran"]) {
      const section = find(`#${part}`);
      if (section.contains(document.activeElement) || section.matches(":hover")) { version = null; continue; }
      const open = all("details", section).map((details) => details.open);
      try {
        await fetchInto(section, `/part/${part}${location.search}`);
      } catch { continue; }
      all("details", section).forEach((details, i) => { details.open = open[i] ?? details.open; });
      if (part === "working") readOut();
    }
  }
}

readOut();
if (live) { followFilter(); follow(); } else { filterReport(); }
