// What every view stands on: elements made without markup, numbers as text, states of a pane, routes, keys and the frame.
"use strict";
(() => {
  const mxd = (window.mxd = { state: { run: null, status: null, student: null } });
  const $ = (id) => document.getElementById(id);

  // ---- elements
  function fill(el, props, children) {
    for (const [name, value] of Object.entries(props || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "class") el.setAttribute("class", value);
      else if (name === "text") el.textContent = value;
      else if (name === "on") for (const [event, fn] of Object.entries(value)) el.addEventListener(event, fn);
      else if (name === "style") for (const [key, one] of Object.entries(value)) el.style.setProperty(key, String(one));
      else if (name === "props") Object.assign(el, value);
      else el.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) el.append(child);
    return el;
  }
  /** An HTML element. props: class, text, any attribute (false or null: left out), on {event: fn}, style {prop: value}, props {}. */
  mxd.h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
  /** The same for SVG. */
  mxd.svg = (tag, props, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
  const h = mxd.h;

  // ---- numbers as text
  const unknown = (v) => v === null || v === undefined || !Number.isFinite(v);
  const bare = (text) => text.replace(/^0\./, ".");
  const whole = (v) => Math.round(v).toLocaleString("en-GB");
  const power = (size) => size.toExponential(1).replace("e+", "e").replace(".0e", "e");
  function digits(size, n) {
    if (size === 0) return "0";
    if (size >= 1e7 || size < 1e-4) return power(size);
    return size >= 1000 || size >= 10 ** n ? whole(size) : bare(size.toPrecision(n));
  }
  const nats = (size) => (size === 0 || size < 1e-4 ? digits(size, 2) : size < 0.01 ? bare(size.toPrecision(2)) : bare(size.toFixed(2)));
  /** Numbers as text: int "21,504", big "4.1 M"; unknown is "–". */
  mxd.fmt = {
    int: (v) => (unknown(v) ? "–" : whole(v).replace("-", "−")),
    big: (v) => (unknown(v) ? "–" : v >= 1e9 ? `${(v / 1e9).toFixed(1)} G` : v >= 1e6 ? `${(v / 1e6).toFixed(1)} M` : whole(v)),
    /** Firings of so many tokens: "1 in 2,310". */
    rate(fires, tokens) {
      if (unknown(fires) || unknown(tokens)) return "–";
      if (fires <= 0) return `0 of ${mxd.fmt.big(tokens)}`;
      return tokens / fires < 10 ? `1 in ${(tokens / fires).toFixed(1)}` : `1 in ${whole(tokens / fires)}`;
    },
    /** A difference in nats, always with its sign: "+.21". */
    nats: (v) => (unknown(v) ? "–" : `${v < 0 ? "−" : v > 0 ? "+" : ""}${nats(Math.abs(v))}`),
    /** So many significant digits: ".831". */
    num: (v, n = 3) => (unknown(v) ? "–" : (v < 0 ? "−" : "") + digits(Math.abs(v), n)),
    /** A share of 1: "99.6 %". */
    pct: (v) => (unknown(v) ? "–" : `${(100 * v).toFixed(Math.abs(v) < 0.0995 && v !== 0 ? 2 : 1).replace("-", "−")} %`),
    bytes(v) {
      const at = unknown(v) ? -1 : v >= 1e9 ? 3 : v >= 1e6 ? 2 : v >= 1e3 ? 1 : 0;
      return at < 0 ? "–" : `${at ? (v / 1000 ** at).toFixed(1) : v} ${["B", "kB", "MB", "GB"][at]}`;
    },
    /** Unknown, and why: an element. */
    dash: (why) => h("span", { class: "dash", title: why, role: "img", "aria-label": `unknown: ${why}` }, "–"),
    /** A time in the past: "3 min ago". */
    ago(iso) {
      const s = (Date.now() - Date.parse(iso)) / 1000;
      if (!Number.isFinite(s)) return "–";
      if (s < 60) return "just now";
      return s < 5400 ? `${Math.round(s / 60)} min ago` : s < 129600 ? `${Math.round(s / 3600)} h ago` : String(iso).slice(0, 10);
    },
  };
  /** What a student's units are called: "expert", "latent"; "unit" where it isn't known. */
  mxd.word = (student) => (student && student.word && student.word !== "none" ? student.word : "unit");

  // ---- time
  /** fn, called once things have been quiet for ms; `.now()` calls what waits at once, `.cancel()` drops it. */
  mxd.debounce = (fn, ms) => {
    let timer = null;
    let held = null;
    const now = () => {
      clearTimeout(timer);
      const args = held;
      held = null;
      if (args) fn(...args);
    };
    const late = (...args) => {
      held = args;
      clearTimeout(timer);
      timer = setTimeout(now, ms);
    };
    return Object.assign(late, { now, cancel: () => ((held = null), clearTimeout(timer)) });
  };
  /** ask(work(signal) -> promise, then, otherwise): a newer call aborts the older and its answer is dropped. `ask.cancel()`. */
  mxd.latest = () => {
    let stop = null;
    const ask = async (work, then, otherwise) => {
      ask.cancel();
      const mine = (stop = new AbortController());
      try {
        const answer = await work(mine.signal);
        if (stop === mine && !mine.signal.aborted && then) then(answer);
      } catch (error) {
        if (stop !== mine || mine.signal.aborted || mxd.aborted(error)) return;
        if (otherwise) otherwise(error);
        else throw error;
      }
    };
    ask.cancel = () => stop && stop.abort();
    return ask;
  };
  /** Whether an error only says that nobody wants the answer any more. */
  mxd.aborted = (error) => Boolean(error) && error.name === "AbortError";
  /** localStorage, where there is one: value, or null. With a second argument, write. */
  mxd.kept = (key, value) => {
    try {
      if (value === undefined) return localStorage.getItem(`mxd-${key}`);
      localStorage.setItem(`mxd-${key}`, value);
    } catch {
      // private windows and some file pages have none: nothing is remembered
    }
    return null;
  };

  // ---- states of a pane
  const ui = (mxd.ui = {
    /** A skeleton of this height in px; it shows after 150 ms. */
    loading: (height = 120) => h("div", { class: "skel", role: "img", "aria-label": "loading", style: { height: `${height}px` } }),
    /** Nothing here: why, and the command that fills it. */
    empty: (why, command) => h("div", { class: "empty" }, h("p", null, why), command && ui.command(command)),
    /** A small button. */
    button: (text, click, props) => h("button", { type: "button", class: "small", on: { click }, ...props }, text),
    /** A command to copy. */
    command: (text) =>
      h("span", { class: "command" }, h("code", null, text), ui.button("Copy", () => ui.copy(text))),
    /** What went wrong in one line (what, expected, got, next), and a button to try again. */
    failed(error, retry) {
      const e = error instanceof mxd.ApiError ? error : { what: error && error.message ? error.message : String(error) };
      const part = (name) => e[name] && h("span", null, h("b", null, name), ` ${e[name]} `);
      const again = retry && ui.button("Try again", retry);
      return h("div", { class: "failed", role: "alert" }, h("strong", null, e.what, " "), ["expected", "got", "next"].map(part), again);
    },
    /** A banner; level is "note" or "warn". */
    note: (text, level = "note") => h("div", { class: `banner ${level}`, role: "note" }, text),
    /** A modal dialog; body is a node or an array. Returns {el, close}; Esc and the button close it, focus goes back. */
    dialog(title, body) {
      const shut = h("button", { type: "button", class: "icon", "aria-label": "Close", on: { click: () => el.close() } }, "✕");
      const head = h("header", null, h("h2", null, title), shut);
      const el = h("dialog", { "aria-label": title }, head, h("div", { class: "dialog-body" }, body));
      el.addEventListener("close", () => el.remove());
      el.addEventListener("click", (event) => event.target === el && el.close());
      document.body.append(el);
      el.showModal();
      return { el, close: () => el.close() };
    },
    /** Say it to screen readers. */
    announce(text) {
      $("announce").textContent = text;
    },
    /** Put text on the clipboard; where that's forbidden, show it to be copied by hand. */
    async copy(text) {
      try {
        await navigator.clipboard.writeText(text);
        ui.announce("copied");
      } catch {
        const area = h("textarea", { readonly: true, rows: 4, "aria-label": "text to copy" }, text);
        ui.dialog("Copy this", area);
        area.select();
      }
    },
    /** Offer content (text or Blob) as a file. */
    save(content, name, type = "application/json") {
      const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
      const link = h("a", { href: url, download: name, hidden: true });
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    },
    /** A tooltip. lines: text, an array of lines, or a function of the element pointed at (null: none); el may hold many such. */
    tip(el, lines) {
      tips.set(el, lines);
      return el;
    },
  });

  // One tooltip, delegated: hover shows it after 80 ms, focus at once, Esc hides it, the pointer may rest on it.
  const tips = new WeakMap();
  let tipOf = null;
  function tipAt(target) {
    for (let el = target; el instanceof Element; el = el.parentElement) {
      if (!tips.has(el)) continue;
      const lines = tips.get(el);
      const found = typeof lines === "function" ? lines(target) : lines;
      return found && found.length ? { anchor: typeof lines === "function" ? target : el, lines: [found].flat() } : null;
    }
    return null;
  }
  function hideTip() {
    if (tipOf) tipOf.removeAttribute("aria-describedby");
    tipOf = null;
    $("tip").hidden = true;
  }
  function showTip(target) {
    const found = target.isConnected ? tipAt(target) : null;
    hideTip();
    if (!found) return;
    const box = $("tip");
    box.replaceChildren(...found.lines.map((line) => h("div", null, line)));
    box.hidden = false;
    const at = found.anchor.getClientRects()[0] || found.anchor.getBoundingClientRect();
    const left = Math.max(4, Math.min(at.left, document.documentElement.clientWidth - box.offsetWidth - 8));
    const above = at.top - box.offsetHeight - 6;
    box.style.setProperty("left", `${left}px`);
    box.style.setProperty("top", `${above < 4 ? at.bottom + 6 : above}px`);
    tipOf = found.anchor;
    tipOf.setAttribute("aria-describedby", "tip");
  }
  const hover = mxd.debounce((target) => !$("tip").contains(target) && showTip(target), 80);
  /** Show the tooltip of an element now. */
  ui.showTip = showTip;
  document.addEventListener("pointerover", (event) => hover(event.target));
  document.addEventListener("focusin", (event) => showTip(event.target));
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", hideTip, { capture: true, passive: true });

  // ---- routes: #/STUDENT/VIEW[/ID]?k=v
  const [views, memory] = [new Map(), new Map()];
  let here = null;
  let current = null;
  /** Register a view: {title, mount(el, route, ctx) -> unmount?, update?(route), keys?: {key: {what, run(event)}}}. */
  mxd.view = (name, view) => views.set(name, view);
  const plain = (text) => {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  };
  function parse(hash) {
    const cut = hash.indexOf("?");
    const [student, view, id] = (cut < 0 ? hash : hash.slice(0, cut)).replace(/^#\/?/, "").split("/").map(plain);
    const query = new URLSearchParams(cut < 0 ? "" : hash.slice(cut + 1));
    return { student: student || null, view: view || "overview", id: id || null, query };
  }
  /** Where the page is: {student, view, id, query: URLSearchParams}. */
  mxd.route = () => (current = current || parse(location.hash));
  /** The address of a place; student and view are the present ones where left out; query: an object or URLSearchParams. */
  mxd.href = ({ student, view, id, query } = {}) => {
    const path = [student || (mxd.state.student && mxd.state.student.name) || "-", view || mxd.route().view];
    if (id !== null && id !== undefined) path.push(id);
    const pairs = query instanceof URLSearchParams ? [...query] : Object.entries(query || {});
    const asked = new URLSearchParams(pairs.filter(([, v]) => v !== null && v !== undefined && v !== "")).toString();
    return `#/${path.map((part) => encodeURIComponent(part)).join("/")}${asked && `?${asked.replace(/%2C/g, ",").replace(/%3A/g, ":")}`}`;
  };
  /** Go there; with {replace: true} no new entry in the history. */
  mxd.go = (to, { replace = false } = {}) => {
    write.now();
    const href = mxd.href(to);
    if (href === location.hash) return void show();
    if (!replace) return void (location.hash = href);
    history.replaceState(history.state, "", href);
    show();
  };
  const write = mxd.debounce((push) => {
    const href = mxd.href(mxd.route());
    if (href === location.hash) return;
    if (push) history.pushState(null, "", href);
    else history.replaceState(history.state, "", href);
    if (push) entry();
  }, 300);
  /** Change the query in place (null removes a key) without a call of update(); written to the address after 300 ms. */
  mxd.setQuery = (changes, { replace = true } = {}) => {
    const route = mxd.route();
    for (const [key, value] of Object.entries(changes)) {
      if (value === null || value === undefined || value === "") route.query.delete(key);
      else route.query.set(key, value);
    }
    write(!replace);
  };
  function entry() {
    if (!history.state || !history.state.k) history.replaceState({ k: Math.random().toString(36).slice(2) }, "");
    const { k } = history.state;
    if (!memory.has(k)) memory.set(k, {});
    if (here) here.ctx.kept = memory.get(k);
    return memory.get(k);
  }
  function scrollTo(y) {
    const until = performance.now() + 2000;
    let mine = true; // until the reader moves
    for (const event of ["wheel", "keydown", "pointerdown"]) addEventListener(event, () => (mine = false), { once: true, passive: true });
    const step = () => {
      if (!mine) return;
      window.scrollTo(0, y);
      if (Math.abs(window.scrollY - y) > 1 && performance.now() < until) requestAnimationFrame(step);
    };
    step();
  }
  function frame(route) {
    const tab = route.view === "unit" ? "units" : route.view;
    for (const link of document.querySelectorAll("[data-tab]")) {
      link.setAttribute("href", mxd.href({ view: link.dataset.tab }));
      if (link.dataset.tab === tab) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    $("picker").value = mxd.state.student ? mxd.state.student.name : "";
  }
  /** Draw the view that the address names. Views: mount's third argument is {signal, student, run, kept (remembered per entry)}. */
  function show() {
    const { run } = mxd.state;
    if (!run) return;
    write.cancel();
    hideTip();
    current = parse(location.hash);
    const route = current;
    const preferred = run.students.find((s) => s.store && !s.is_control) || run.students.find((s) => s.store) || run.students[0] || null;
    const named = run.students.find((s) => s.name === route.student);
    mxd.state.student = named || preferred;
    const kept = entry();
    const title = (view) => (typeof view.title === "function" ? view.title(route) : view.title) || route.view;
    const view = views.get(route.view);
    document.title = `${view ? title(view) : route.view} · ${run.name} · mxd`;
    frame(route);
    const student = mxd.state.student && mxd.state.student.name;
    if (here && here.view === view && here.student === student && view && view.update) return void view.update(route);
    const moved = Boolean(here);
    leave();
    const main = $("main");
    main.replaceChildren();
    main.dataset.view = route.view;
    const stop = new AbortController();
    const ctx = { signal: stop.signal, student: mxd.state.student, run, kept };
    here = { view, student, stop, ctx, unmount: null };
    if (!view) return void main.append(ui.empty(`There is no view "${route.view}" here.`));
    const lost = route.student && route.student !== "-" && !named;
    if (lost) main.append(ui.note(`This run has no student "${route.student}"; shown: ${student}.`, "warn"));
    const mine = here;
    const broken = (error) => !mxd.aborted(error) && here === mine && main.append(ui.failed(error, () => ((here = null), show())));
    try {
      Promise.resolve(view.mount(main, route, ctx)).then((un) => {
        if (typeof un === "function") here === mine ? (mine.unmount = un) : un();
      }, broken);
    } catch (error) {
      broken(error);
    }
    scrollTo(kept.scroll || 0);
    if (moved && !(document.activeElement && document.activeElement.closest(".frame"))) main.focus({ preventScroll: true });
  }
  function leave() {
    if (!here) return;
    here.stop.abort();
    if (here.unmount) here.unmount();
    here = null;
  }
  /** Draw the present view again from nothing, after the run's data changed. */
  mxd.redraw = () => (leave(), show());
  const there = () => Boolean(here && history.state) && memory.get(history.state.k) === here.ctx.kept; // two quick steps back: one place
  addEventListener("hashchange", () => /^#\/|^#?$/.test(location.hash) && !there() && show());
  addEventListener("scroll", () => here && (here.ctx.kept.scroll = window.scrollY), { passive: true });
  document.addEventListener("click", (event) => event.target.closest("a") && write.now(), true);

  // ---- keys
  const places = { o: "overview", u: "units", s: "sentence", b: "bench", c: "compare", n: "notes" };
  let went = 0;
  const singles = () => mxd.kept("keys") !== "off";
  const search = () => document.querySelector("#main [data-search]") || $("find-text"); // a view may have a search of its own
  function onKey(event) {
    const { key, target } = event;
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (key === "Escape" && !$("tip").hidden) return void hideTip();
    if (document.querySelector("dialog[open]")) return;
    const typing = target.closest("textarea, select, input:not([type=checkbox], [type=radio], [type=range])");
    if (typing && key !== "Escape") return;
    if ((key === "Enter" || key === " ") && target.closest("button, a, summary, input, [role=option]")) return;
    if (key.length === 1 && !singles()) return;
    const keys = (here && here.view && here.view.keys) || {};
    let act = null;
    if (performance.now() - went < 1000 && places[key]) act = () => mxd.go({ view: places[key] });
    else if (Object.hasOwn(keys, key)) act = keys[key].run;
    else if (key === "g") act = () => void (went = performance.now());
    else if (key === "/") act = () => (search().focus(), search().select());
    else if (key === "?") act = mxd.keys.help;
    if (key !== "g") went = 0;
    if (act && act(event) !== false) event.preventDefault();
  }
  document.addEventListener("keydown", onKey);
  const caps = (key) => key.split(" ").map((k) => [h("kbd", null, k || "Space"), " "]);
  const row = (key, what) => h("tr", null, h("th", { scope: "row" }, caps(key)), h("td", null, what));
  mxd.keys = {
    /** The dialog that lists all keys. */
    help() {
      const mine = Object.entries((here && here.view && here.view.keys) || {}).map(([key, { what }]) => row(key.trim(), what));
      const off = h("input", { type: "checkbox", checked: singles(), on: { change: () => mxd.kept("keys", off.checked ? "on" : "off") } });
      const jumps = Object.entries(places).map(([k, name]) => row(`g ${k}`, name));
      const all = [row("/", "search"), jumps, row("?", "this list"), row("Esc", "stop, close")];
      const moves = [row("← →", "tokens of a row"), row("↑ ↓ Home End PgUp PgDn", "rows of a table")];
      const table = (name, rows) => h("table", { class: "keys" }, h("caption", null, name), h("tbody", null, rows));
      ui.dialog("Keys", [
        mine.length ? table("This view", mine) : null,
        table("Everywhere", [all, moves]),
        h("p", null, h("label", null, off, " single keys do something (Esc and arrows always do)")),
      ]);
    },
  };
})();
