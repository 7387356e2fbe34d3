"use strict";
// What the page does beyond links and forms, which work without it: reads curves out, filters in place, goes through
// episodes by keys, enlarges pictures, follows a run. Whatever comes from the server was escaped there; nothing here
// makes markup of text. Addresses are relative: a run may be one of several that are served.

const parts = document.body.dataset.parts.split(" ").filter(Boolean); // sections to renew while a run goes on
const find = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// --- curves: one step, read in every panel ---------------------------------------------------------------------------

function readOut(at) {
  const slider = find("#at");
  if (!slider) return;
  const { steps, panels, axes, span: [first, last] } = JSON.parse(find("#readings").textContent);

  function show() {
    const step = Number(slider.value);
    let nearest = 0; // a long run has readings for some of its steps only
    steps.forEach((each, i) => { if (Math.abs(each - step) < Math.abs(steps[nearest] - step)) nearest = i; });
    find("#at-value").textContent = step;
    const link = find("#at-episodes");
    if (link) link.href = `?from=${step}&to=${step}#asks`;
    for (const panel of all(".panel")) {
      const values = panels[panel.dataset.panel], line = find(".plot i", panel);
      if (!line) continue;
      line.style.left = `${100 * (axes[0] + axes[2] * (step - first) / (last - first))}%`;
      for (const output of all("output", panel)) {
        const value = values[output.dataset.label][nearest];
        output.textContent = value === null ? "–" : String(Number(value.toPrecision(3)));
      }
    }
    for (const grid of all(".panels")) grid.classList.add("reading-out");
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
  if (at !== undefined) { slider.value = at; show(); }
}

// --- episodes --------------------------------------------------------------------------------------------------------

function filterReport() {
  const form = find("#filter"), list = find("#episodes"), articles = all(".episode", list);
  const said = (article) => all(".said", article).map((e) => e.textContent).join("\n").toLocaleLowerCase();
  const texts = new Map(articles.map((article) => [article, said(article)]));

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

async function fetchText(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
  return answer.text();
}

let latest = 0; // only the answer to the latest request is shown

async function showEpisodes(query) {
  const mine = ++latest, target = find("#episodes");
  target.setAttribute("aria-busy", "true");
  try {
    const text = await fetchText(`part/episodes?${query}`);
    if (mine !== latest) return;
    target.innerHTML = text;
    history.replaceState(null, "", `?${query}#asks`);
    find("#trouble").hidden = true;
  } catch {
    find("#trouble").hidden = false;
  } finally {
    if (mine === latest) target.removeAttribute("aria-busy");
  }
}

function followFilter() {
  const form = find("#filter");
  const steps = () => `${form.elements.from.value}-${form.elements.to.value}`;
  let chosen = steps(), typing;

  function ask() {
    const query = new URLSearchParams(new FormData(form)).toString();
    if (chosen !== steps()) refresh("agreement", query);
    chosen = steps();
    return showEpisodes(query);
  }

  form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  form.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(ask, 250); });
  document.addEventListener("click", async (event) => {
    const page = event.target.closest(".pager a"), stretch = event.target.closest("a[data-steps]");
    if (!page && !stretch) return;
    event.preventDefault();
    const values = new URL((page ?? stretch).href).searchParams;
    if (page) {
      await showEpisodes(values.toString());
    } else {
      for (const name of ["from", "to", "q"]) form.elements[name].value = values.get(name) ?? "";
      form.elements.show.value = "newest";
      find("#fresh").hidden = true;
      await ask();
    }
    find("#asks").scrollIntoView();
    find(".pager").focus({ preventScroll: true });
  });
}

function openNext(direction) {
  const shown = all(".episode:not([hidden]) > details");
  const standing = shown.findIndex((details) => details.contains(document.activeElement));
  const place = standing >= 0 ? standing : shown.findIndex((details) => details.open);
  const next = shown[place + direction];
  if (!next) return find(`.pager a[rel=${direction > 0 ? "next" : "prev"}]`)?.click(); // of the list's pages
  if (place >= 0) shown[place].open = false;
  next.open = true;
  find("summary", next).focus({ preventScroll: true });
  next.parentElement.scrollIntoView();
}

function goByKeys() {
  document.addEventListener("keydown", (event) => {
    const direction = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
    const busy = event.target.closest("input, select, .scroll, dialog, .written pre"); // where these keys have a use
    if (!direction || busy || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    openNext(direction); // an episode's own page has no list, but a pager
  });
}

function openNamed() { // in a report, an address may name an episode
  const details = /^#episode-[0-9]+-[0-9]+$/.test(location.hash) && find(`${location.hash} > details`);
  if (!details) return;
  details.open = true;
  details.parentElement.hidden = false;
  details.parentElement.scrollIntoView();
}

function enlargePictures() {
  const dialog = find("#enlarged"), large = find("img", dialog);
  document.addEventListener("click", (event) => {
    if (event.target === dialog || event.target === large) return dialog.close();
    const picture = event.target.closest("img.thumb");
    if (!picture) return;
    event.preventDefault(); // of the summary that it may stand in
    for (const name of ["src", "alt"]) large[name] = picture[name];
    large.toggleAttribute("data-small", picture.naturalWidth <= 256 && picture.naturalHeight <= 256);
    dialog.showModal();
  });
}

// --- following a run -------------------------------------------------------------------------------------------------

async function refresh(part, query = location.search.slice(1)) {
  const section = find(`#${part}`), text = await fetchText(`part/${part}?${query}`).catch(() => null);
  if (text === null) return false;
  // What the reader has opened, where they stand, and the step that they read the curves at, stay.
  const open = all("details", section).map((details) => details.open), slider = find("#at", section);
  const chosen = all("input:checked", section).map((box) => box.value);
  const reading = slider && slider.value !== slider.max ? slider.value : undefined;
  const reachable = "a, button, input, summary, [tabindex]";
  const focused = all(reachable, section).indexOf(document.activeElement);
  section.innerHTML = text;
  all("details", section).forEach((details, i) => { details.open = open[i] ?? details.open; });
  if (focused >= 0) all(reachable, section)[focused]?.focus({ preventScroll: true });
  for (const box of all("input[type=checkbox]", section)) box.checked = chosen.includes(box.value);
  if (find("#at", section)) readOut(reading);
  return true;
}

const selecting = (section) => !getSelection().isCollapsed && section.contains(getSelection().anchorNode);

async function follow() {
  const versions = Object.fromEntries(parts.map((part) => [part, document.body.dataset.version]));
  let seen = null, pause = 3000;
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, document.hidden ? 15000 : pause));
    const chip = find("#state");
    let pulse;
    try {
      pulse = JSON.parse(await fetchText(`pulse${location.search}`));
    } catch {
      chip.textContent = "the viewer has stopped";
      chip.className = "chip stopped";
      continue;
    }
    chip.textContent = pulse.state;
    chip.className = `chip ${pulse.state.replace(" ", "-")}`;
    if ("step" in pulse) find("#step").textContent = pulse.step; // of several runs, each says its own
    seen ??= pulse.episodes;
    if (pulse.episodes !== seen) find("#fresh").hidden = false;
    seen = pulse.episodes;
    const began = performance.now();
    for (const part of parts) {
      if (versions[part] === pulse.version || selecting(find(`#${part}`))) continue;
      if (await refresh(part)) versions[part] = pulse.version;
    }
    pause = Math.max(3000, 10 * (performance.now() - began)); // leaves the processor to the training
  }
}

readOut();
enlargePictures();
goByKeys();
if (find("#filter")) { if (parts.length) followFilter(); else filterReport(); }
if (parts.length) follow(); else openNamed();
addEventListener("hashchange", openNamed);
