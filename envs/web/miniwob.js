// Runs in every MiniWoB++ page before its own scripts: makes it turn-based, readable as text, and repeatable.
(() => {
  // ---- time, which passes only when told to: no wall clock, and the same animations at every replay ----
  const RealDate = Date;
  const start = RealDate.UTC(2017, 0, 1, 12);
  let now = start, last = 0, timers = [];
  const plan = (task, args, wait, every) => {
    const run = typeof task === "function" ? () => task(...args) : () => (0, eval)(task);
    const step = Math.max(1, Number(wait) || 0);
    timers.push({ id: ++last, at: now + step, every: every ? step : 0, run });
    return last;
  };
  const cancel = (id) => { timers = timers.filter((timer) => timer.id !== id); };
  window.setTimeout = (task, wait, ...args) => plan(task, args, wait, false);
  window.setInterval = (task, wait, ...args) => plan(task, args, wait, true);
  window.requestAnimationFrame = (task) => plan(() => task(now - start), [], 16, false);
  window.clearTimeout = window.clearInterval = window.cancelAnimationFrame = cancel;
  performance.now = () => now - start;
  window.Date = new Proxy(RealDate, {
    construct: (real, args, made) => Reflect.construct(real, args.length ? args : [now], made),
    apply: () => new RealDate(now).toString(),
    get: (real, key) => (key === "now" ? () => now : Reflect.get(real, key)),
  });

  const advance = (ms) => {
    const end = now + ms;
    for (let left = 20000; left > 0; left--) {
      const due = timers.filter((timer) => timer.at <= end).sort((a, b) => a.at - b.at || a.id - b.id)[0];
      if (!due) break;
      now = due.at;
      if (due.every) due.at += due.every;
      else cancel(due.id);
      try { due.run(); } catch (error) { console.error(error); }
    }
    now = end;
    for (const frame of document.querySelectorAll("iframe")) frame.contentWindow?.miniwob?.advance(ms);
  };

  // ---- a pointer that moves only when moved: Chromium tells again where it is, at a time of its own choosing,
  // when the page changes below it ----
  let pointer = "";
  for (const kind of ["mouse", "pointer"])
    for (const change of ["over", "out", "enter", "leave", "move"])
      window.addEventListener(kind + change, (event) => {
        const at = `${event.clientX},${event.clientY}`;
        if (event.isTrusted && at === pointer) event.stopImmediatePropagation();
        else if (event.isTrusted && event.type === "mousemove") pointer = at;
      }, true);

  // ---- a link out of a frame ends the task, as the package has it, but at once: no load to wait for ----
  if (window !== window.parent)
    window.addEventListener("click", (event) => {
      const link = event.target.closest?.("a[href]");
      const here = (address) => address.split("#")[0];
      if (!link || event.defaultPrevented || link.protocol === "javascript:") return;
      if (here(link.href) === here(location.href)) return;
      event.preventDefault();
      if (!link.target) window.parent.core.endEpisode(-1, false, "navigated away");
    });

  // ---- names for what has no text: shapes, colours, icons ----
  const NOT_THE_TASK = "#query, #query-wrap, #reward-display, #sync-task-cover, #click-canvas";
  const SHAPES = "circle, rect, ellipse, polygon, polyline, path, line, text";
  const CONTROLS = "input, select, textarea, option, img[alt], svg, canvas, iframe, script, style, br";
  const NAMES = "black white aqua blue gray green lime maroon navy olive purple red silver teal yellow pink " +
    "magenta gold orange brown";
  const probe = document.createElement("i");
  const colours = new Map();
  const colour = (value) => { // "rgb(255, 0, 0)" is "red"; a shade without a name is "#ff0001"
    if (!colours.size) {
      document.documentElement.append(probe);
      for (const name of NAMES.split(" ")) colours.set(((probe.style.color = name), getComputedStyle(probe).color), name);
      probe.remove();
    }
    const parts = value.match(/[\d.]+/g)?.map(Number);
    if (!parts || parts[3] === 0) return "";
    return colours.get(value) || "#" + parts.slice(0, 3).map((part) => part.toString(16).padStart(2, "0")).join("");
  };
  const visible = (element) => {
    const box = element.getBoundingClientRect();
    return box.width + box.height > 2 && element.checkVisibility({ visibilityProperty: true });
  };
  const place = (element) => {
    if (element.matches("line")) {
      const at = element.getScreenCTM();
      const end = (x, y) => `${Math.round(x * at.a + at.e)},${Math.round(y * at.d + at.f)}`;
      return ` from ${end(element.x1.baseVal.value, element.y1.baseVal.value)}` +
        ` to ${end(element.x2.baseVal.value, element.y2.baseVal.value)}`;
    }
    const box = element.getBoundingClientRect();
    return ` at ${Math.round(box.x + box.width / 2)},${Math.round(box.y + box.height / 2)}`;
  };
  const described = (element) => {
    const style = getComputedStyle(element), drawn = element.matches(SHAPES);
    const paint = drawn ? (style.fill === "none" ? style.stroke : style.fill) : style.backgroundColor;
    const text = element.textContent.trim();
    const sides = element.points?.numberOfItems;
    const shape = { circle: "circle", rect: "rectangle", text: "letter" }[element.localName] ||
      (sides === 3 ? "triangle" : element.localName);
    const hint = drawn ? `${element.id} ${shape}` : element.id || [...element.classList].pop() || element.localName;
    const size = drawn ? ` ${Math.round(element.getBoundingClientRect().width)} wide` : "";
    return `${colour(paint)} ${hint} ${text}${size}`.replace(/\s+/g, " ").trim();
  };

  const listening = new WeakSet();
  const { addEventListener } = EventTarget.prototype;
  EventTarget.prototype.addEventListener = function (type, ...rest) {
    if (this instanceof Element && /^(click|dblclick|mousedown|mouseup)$/.test(type)) listening.add(this);
    return addEventListener.call(this, type, ...rest);
  };
  const cursor = (element) => getComputedStyle(element).cursor;
  const seen = (element, places) => { // although it has no text
    const style = getComputedStyle(element);
    return listening.has(element) || colour(style.backgroundColor) || style.backgroundImage !== "none" ||
      (style.cursor === "pointer" && cursor(element.parentElement) !== "pointer") ||
      (places && style.cursor.endsWith("-resize"));
  };

  // Names what the accessibility tree would leave out, with its place if places matter; and marks what can be
  // clicked, but listens only through an element around it.
  const annotate = (places) => {
    for (const element of document.querySelectorAll(NOT_THE_TASK)) element.ariaHidden = "true";
    for (const element of document.body.querySelectorAll("*")) {
      const button = element.closest("button");
      if (element.closest(NOT_THE_TASK) || (button && button !== element) || !visible(element)) continue;
      if (cursor(element) === "pointer" && cursor(element.parentElement) !== "pointer")
        element.onmousedown ||= () => {};
      const text = element.textContent.trim(), drawn = element.matches(SHAPES);
      const leaf = !element.children.length && !element.matches(CONTROLS) && !element.closest("svg");
      if (button ? text || element.title : !drawn && !(leaf && (text ? places : seen(element, places)))) continue;
      element.ariaLabel = (text && !drawn ? text : described(element)) + (places && !button ? place(element) : "");
    }
  };

  // ---- the episode ----
  const words = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    if (node.nodeType !== Node.ELEMENT_NODE) return "";
    if (!node.childNodes.length && visible(node)) return ` (${colour(getComputedStyle(node).backgroundColor) || described(node)}) `;
    return [...node.childNodes].map(words).join("");
  };
  const squeezed = (text) => text.replace(/\s+/g, " ").trim();
  const utterance = () => { // with words for a colour or an icon that it shows
    const said = core.getUtterance(), query = document.querySelector("#query");
    if (typeof said !== "string") return said.utterance;
    return said === squeezed(query.textContent) ? squeezed(words(query)) : said;
  };
  const unhover = () => { // a picture that is loaded when the pointer comes moves what is to be clicked
    for (const sheet of document.styleSheets) {
      if (sheet.href) continue; // a file's rules cannot be read
      for (let i = sheet.cssRules.length - 1; i >= 0; i--)
        if (sheet.cssRules[i].selectorText?.includes(":hover")) sheet.deleteRule(i);
    }
  };
  const begin = (seed, mode) => {
    unhover();
    advance(1000); // scripts that begin when the page is loaded
    core.EPISODE_MAX_TIME = 1e9; // ms: no reward for haste, no end while a model thinks
    Math.seedrandom(seed, { state: true, global: true });
    core.setDataMode(mode);
    document.body.removeEventListener("click", core.canvasDrawClick); // it draws crosses for people to look at
    core.startEpisodeReal();
    advance(1000);
  };
  const pages = () => [document, ...[...document.querySelectorAll("iframe")].map((frame) => frame.contentDocument)];
  const state = () => ({
    pages: pages().map((page) => [...page.body.children].filter((part) => !part.matches(NOT_THE_TASK + ", script"))
      .map((part) => part.outerHTML)),
    fields: pages().map((page) => [...page.querySelectorAll("input, select, textarea")]
      .map((field) => [field.value, field.checked, field.selectedIndex])),
    selected: pages().map((page) => String(page.getSelection())),
    random: Math.random.state(),
    outcome: outcome(),
  });
  const tick = () => { // what follows an action
    advance(1000);
    return outcome();
  };
  const outcome = () => ({ ready: WOB_TASK_READY, done: WOB_DONE_GLOBAL, reward: WOB_RAW_REWARD_GLOBAL });

  window.miniwob = { advance, annotate, begin, outcome, state, tick, utterance };
})();
