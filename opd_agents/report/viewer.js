"use strict";
// The trajectory viewer. What models and tools wrote becomes text nodes only: nothing here sets HTML.
(() => {
  const data = JSON.parse(document.getElementById("trajectory-data").textContent);
  const nonce = document.currentScript.nonce;
  const ROW = 54; // pixels of a row in the list, as the style sheet has it
  const LONG = 400; // tokens: a text with more is folded
  const $ = (id) => document.getElementById(id);
  const [viewer, list, article, info, colour] = ["viewer", "list", "trajectory", "token", "colour"].map($);
  const spacer = list.firstElementChild;
  const filters = $("filters");

  // The list: [source, environment, uid, task, outcome, reward, turns, KL, first error, kind, parent, repair].
  const rows = data.rows.map((row, place) => {
    const [source, environment, uid, task, outcome, reward, turns, kl, error, kind, parent, repair] = row;
    const [label, part, step, signs] = data.sources[source];
    const key = `${label}/${uid}`;
    const text = `${key} ${task} ${kind} ${data.environments[environment]}`.toLowerCase();
    return { place, key, label, part, step, signs, environment, uid, task, outcome, reward, turns, kl, error,
      kind, parent, repair, text };
  });
  const oneStage = new Set(rows.filter((row) => row.step).map((row) => row.part)).size === 1;
  const byKey = new Map(rows.map((row) => [row.key, row]));
  const state = { shown: rows, at: -1, row: null, body: null, unfolded: false, token: null, turn: 0, asked: 0 };

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
    return element;
  }
  const badge = (text, kind = "") => make("span", { class: `badge ${kind}` }, text);
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
  const nats = (value) => value.toFixed(Math.abs(value) < 0.1 ? 3 : 2);
  const outcomeKind = (row) => ({ success: "good", failure: "bad" }[data.outcomes[row.outcome]] ?? "warn");

  // ---- trajectories that are not in the page: a script beside it, loaded once it is needed
  let side = null;
  function loadSide() {
    side ??= new Promise((resolve, reject) => {
      window.opdTrajectories = (id, bodies) => (id === data.id ? resolve(bodies) : reject());
      const script = make("script", { src: encodeURIComponent(data.side) });
      script.nonce = nonce;
      script.onerror = reject;
      document.head.append(script);
    });
    return side;
  }
  async function bodyOf(row) {
    if (data.sample[row.place]) return data.sample[row.place];
    try {
      const body = (await loadSide())[row.place];
      return body === undefined ? null : JSON.parse(body);
    } catch {
      side = null; // it may be put there later
      return null;
    }
  }

  // ---- filters
  function fill(select, entries, all) {
    select.append(...(all === null ? [] : [make("option", { value: "" }, all)]),
      ...entries.map(([value, text]) => make("option", { value }, text)));
    select.closest("label").hidden = entries.length < (all === null ? 1 : 2) && select.name !== "sign";
  }
  function fillFilters() {
    const used = (name) => new Set(rows.map((row) => row[name]));
    const outcomes = used("outcome");
    fill(filters.outcome, [...data.outcomes.entries()].filter(([i]) => outcomes.has(i)), "any");
    fill(filters.environment, [...data.environments.entries()], "any");
    fill(filters.part, [...used("part")].map((part) => [part, part]), "anywhere");
    fill(filters.sign, [...data.signs.entries()], "any");
    filters.sign.closest("label").hidden = !data.signs.length;
    filters.repair.closest("label").hidden = !rows.some((row) => row.repair);
  }
  function applyFilters() {
    const is = (name, value) => filters[name].value === "" || filters[name].value === String(value);
    const words = filters.find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = rows.filter((row) =>
      is("outcome", row.outcome) && is("environment", row.environment) && is("part", row.part) &&
      (filters.sign.value === "" || row.signs.includes(Number(filters.sign.value))) &&
      row.repair >= Number(filters.repair.value) && words.every((word) => row.text.includes(word)));
    const order = filters.order.value;
    if (order) shown.sort((a, b) => (b[order] ?? -1) - (a[order] ?? -1) || a.place - b.place);
    state.shown = shown;
    state.at = shown.indexOf(state.row);
    spacer.style.height = `${shown.length * ROW}px`;
    $("count").textContent = `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} shown`;
    list.scrollTop = Math.max(0, state.at * ROW - list.clientHeight / 2);
    drawList();
  }

  // ---- the list: only the rows in sight are in the page
  function drawList() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
    const last = Math.min(state.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 6);
    const items = [];
    for (let i = first; i < last; i++) items.push(item(state.shown[i], i));
    spacer.replaceChildren(...items);
    if (state.at >= first && state.at < last) list.setAttribute("aria-activedescendant", `row-${state.at}`);
    else list.removeAttribute("aria-activedescendant");
  }
  function item(row, i) {
    const facts = [plural(row.turns, "turn")];
    if (row.kl !== null) facts.push(`KL ${nats(row.kl)}`);
    if (row.error) facts.push(`error at ${row.error}`);
    if (row.step) facts.unshift(`step ${row.step}`);
    if (!row.step || !oneStage) facts.push(row.part);
    if (data.environments.length > 1) facts.push(data.environments[row.environment]);
    const made = make("div", { class: "row", role: "option", id: `row-${i}`, "aria-setsize": state.shown.length,
      "aria-posinset": i + 1, "aria-selected": i === state.at ? "true" : "false" },
    make("span", { class: "line" }, badge(data.outcomes[row.outcome], outcomeKind(row)),
      make("span", { class: "task" }, row.task), row.kind ? badge(row.kind) : "",
      row.repair ? badge(row.repair === 2 ? "repaired" : "rejected", row.repair === 2 ? "good" : "") : "",
      row.signs.length ? badge("alarm", "warn") : ""),
    make("span", { class: "line muted small" }, facts.join(" · ")));
    made.style.top = `${i * ROW}px`;
    return made;
  }
  function select(i, focus = false) {
    if (!state.shown.length) return;
    const place = Math.min(Math.max(i, 0), state.shown.length - 1);
    const top = place * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    open(state.shown[place], { focus });
  }
  async function open(row, { focus = false, address = true } = {}) {
    const asked = ++state.asked;
    state.row = row;
    state.at = state.shown.indexOf(row);
    drawList();
    if (address) history.replaceState(null, "", linkTo(row.key));
    if (!data.sample[row.place]) article.setAttribute("aria-busy", "true");
    const body = await bodyOf(row);
    if (asked !== state.asked) return; // another one was opened meanwhile
    article.removeAttribute("aria-busy");
    Object.assign(state, { body, turn: 0, token: null });
    info.hidden = true;
    draw();
    if (focus) article.focus();
  }
  const linkTo = (key) => `#trajectory=${encodeURIComponent(key)}`;
  function openAddress() {
    const found = /^#trajectory=(.*)$/.exec(location.hash);
    if (!found) return false;
    let key = found[1];
    try { key = decodeURIComponent(key); } catch { /* as it stands there */ }
    const row = byKey.get(key);
    if (!row) {
      article.replaceChildren(make("p", {}, `There is no trajectory ${key} in this report.`));
    } else {
      if (!state.shown.includes(row)) {
        filters.reset();
        applyFilters();
      }
      open(row, { address: false }).then(applyFilters);
    }
    $("trajectories").scrollIntoView();
    return true;
  }

  // ---- colours: what a token has, how strong it is (0 to 1), in which colour
  const MODES = {
    kl: { title: "KL to the teacher", unit: "nats", colour: () => "--c3", of: (v) => Math.sqrt(v / 4), ends: "0 – 4 nats" },
    advantage: { title: "Advantage", unit: "", colour: (v) => (v < 0 ? "--c2" : "--c1"),
      of: (v) => Math.sqrt(Math.abs(v) / 2), ends: "−2 – 2" },
    surprise: { title: "Its own surprise", unit: "nats", colour: () => "--c6", of: (v) => Math.sqrt(v / 6), ends: "0 – 6 nats" },
    none: { title: "No colour", colour: () => "--c4", of: () => 0, ends: "" },
  };
  const shade = (mode, value) => {
    const share = Math.min(1, Math.max(0, MODES[mode].of(value) || 0));
    return `color-mix(in srgb, var(${MODES[mode].colour(value)}) ${Math.round(62 * share)}%, transparent)`;
  };
  function valueOf(turn, mode, i) {
    const values = turn[mode];
    return values?.length ? (values.length === 1 ? values[0] : values[i]) / 1000 : undefined;
  }
  function fillColours() {
    fill(colour, Object.entries(MODES).map(([name, mode]) => [name, mode.title]), null);
  }
  /** The first mode that the trajectory has values for, unless the chosen one has some. */
  function settleColour() {
    const has = (mode) => mode === "none" || (state.body?.turns ?? []).some((turn) => turn[mode]);
    for (const option of colour.options) option.disabled = !has(option.value);
    if (!has(state.wanted ?? "kl")) colour.value = Object.keys(MODES).find(has);
    else colour.value = state.wanted ?? "kl";
    const stops = { advantage: [-2, -0.5, 0, 0.5, 2], kl: [0, 0.25, 1, 4], surprise: [0, 0.4, 1.5, 6], none: [] };
    const shades = stops[colour.value].map((value) => shade(colour.value, value));
    $("scale").style.background = shades.length ? `linear-gradient(to right, ${shades.join(", ")})` : "none";
    $("scale").textContent = MODES[colour.value].ends;
    $("masks").hidden = !(state.body?.turns ?? []).some((turn) => turn.unlearned && turn.sizes);
  }

  // ---- one trajectory
  function draw() {
    const { row, body } = state;
    settleColour();
    if (!body) {
      article.replaceChildren(make("p", {}, `${row.key} is in ${data.side}, which is not beside this page or `
        + "belongs to another report. Put it there, or write the report anew."));
      return;
    }
    const focused = article.contains(document.activeElement); // would go with what is replaced
    article.replaceChildren(...head(row, body), ...opening(body),
      make("ol", { class: "turns" }, (body.turns ?? []).map((turn, i) => turnItem(turn, i, body))));
    if (focused) (article.querySelector(`#turn-${state.turn}`) ?? article).focus({ preventScroll: true });
    if (state.unfolded) fold(true);
  }
  function head(row, body) {
    const facts = [`reward ${Number(row.reward.toPrecision(4))}`, plural(row.turns, "turn"),
      `temperature ${body.temperature}`, `seed ${body.seed}`];
    const title = make("h3", { class: "title-row" }, row.task, badge(data.outcomes[row.outcome], outcomeKind(row)),
      row.kind ? badge(row.kind) : "", ...row.signs.map((sign) => badge(data.signs[sign], "warn")));
    const where = make("p", { class: "small muted" }, `${data.environments[row.environment]} · `,
      make("a", { href: linkTo(row.key) }, row.key), ` · ${facts.join(" · ")}`);
    const parts = [title, where];
    const link = (uid) => {
      const key = `${row.label}/${uid}`;
      return byKey.has(key) ? make("a", { href: linkTo(key) }, uid) : uid;
    };
    if (body.parent) {
      const [uid, turn] = body.parent;
      parts.push(make("p", { class: "small" }, "It leaves ", link(uid), ` before turn ${turn}.`));
    }
    const children = rows.filter((other) => other.parent === row.uid && other.label === row.label);
    if (children.length) {
      const links = children.flatMap(({ uid }, i) => (i ? [", ", link(uid)] : [link(uid)]));
      parts.push(make("p", { class: "small" }, "Continued otherwise: ", ...links, "."));
    }
    if (body.error) parts.push(make("p", { class: "flag" }, badge("error", "bad"), ` ${body.error}`));
    if (body.hint) parts.push(make("p", { class: "flag" }, badge("hint"), ` ${body.hint}`));
    for (const [turn, text] of body.feedback ?? []) {
      parts.push(make("p", { class: "flag" }, badge(turn ? `judge, turn ${turn}` : "judge"), ` ${text}`));
    }
    return parts;
  }
  const rest = (n) => (n ? [make("span", { class: "more" }, ` … ${n.toLocaleString("en")} more characters`)] : []);
  function opening(body) {
    return (body.messages ?? []).map(([role, text, more]) =>
      role === "user"
        ? make("div", { class: "request" }, make("span", { class: "sr" }, "Task: "), text, ...rest(more))
        : folded(`${role} · ${firstLine(text)}`, "", () => [make("div", { class: "observation mono" }, text, ...rest(more))]));
  }
  const firstLine = (text) => text.trim().split("\n", 1)[0].slice(0, 160);
  /** A fold whose content is made when it is opened first. */
  function folded(summary, kind, content) {
    const element = make("details", { class: `fold ${kind}` }, make("summary", {}, summary));
    element.fill = () => {
      if (element.childElementCount === 1) element.append(...content());
    };
    element.addEventListener("toggle", () => element.open && element.fill());
    return element;
  }
  function fold(open) {
    state.unfolded = open;
    for (const one of article.querySelectorAll("details.fold")) {
      if (open) one.fill();
      one.open = open;
    }
    $("unfold").textContent = open ? "Fold all" : "Unfold all";
    $("unfold").setAttribute("aria-pressed", open);
  }

  function turnItem(turn, i, body) {
    const repairs = body.repairs ?? [];
    const located = repairs.length && repairs[0].turn === i + 1;
    const earliest = repairs.length ? located : state.row.error === i + 1;
    const marks = [turn.actor ? badge(turn.actor) : "", turn.kept ? badge("inherited") : "",
      earliest ? badge("earliest error", "bad") : "",
      ...(turn.flags ?? []).map(([name]) => badge(name, "warn"))];
    const parts = [make("h4", { class: "turn-head" }, `Turn ${i + 1}`, ...marks, strip(turn)),
      ...actionParts(turn),
      ...(turn.flags ?? []).map(([name, message]) => make("p", { class: "flag" }, `${name}: ${message}`)),
      ...creditParts(turn, body), ...observation(turn)];
    const own = make("div", { class: "own" }, parts);
    const element = make("li", { class: `turn${earliest ? " earliest" : ""}`, id: `turn-${i + 1}`, tabindex: "-1",
      "aria-label": `Turn ${i + 1}` }, located
      ? make("div", { class: "beside" }, own, make("div", { class: "correction" }, repairs.map(correction)))
      : own);
    if (earliest) for (const one of own.querySelectorAll("details.call")) one.open = true;
    return element;
  }
  /** The action's tokens as a strip of their colours. */
  function strip(turn) {
    const n = turn.sizes?.length ?? 0;
    if (!n || colour.value === "none" || valueOf(turn, colour.value, 0) === undefined) return "";
    const cells = Math.min(n, 96);
    const stops = [];
    for (let cell = 0; cell < cells; cell++) {
      let strongest = 0;
      for (let i = Math.floor((cell * n) / cells); i < ((cell + 1) * n) / cells; i++) {
        const value = valueOf(turn, colour.value, i);
        if (Math.abs(value) > Math.abs(strongest)) strongest = value;
      }
      stops.push(`${shade(colour.value, strongest)} ${(100 * cell) / cells}% ${(100 * (cell + 1)) / cells}%`);
    }
    const made = make("span", { class: "strip", "aria-hidden": "true" });
    made.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    made.style.width = `${Math.min(12, 0.8 * cells)}rem`;
    return made;
  }
  /** Runs of tokens of one kind of span; calls and what is long are folded. */
  function actionParts(turn) {
    const n = turn.sizes?.length ?? 0;
    const calls = turn.calls ?? [];
    if (!n) {
      const written = () => [make("div", { class: "action mono text" }, turn.text, ...rest(turn.rest))];
      return calls.length ? [folded(callTitle(calls), "call", written)] : written();
    }
    const made = [];
    let call = 0;
    for (const [kind, start, stop] of joined(turn.spans?.length ? turn.spans : [["text", 0, n]])) {
      const content = () => [make("div", { class: `action mono text ${kind}` }, tokens(turn, start, stop, kind))];
      if (kind === "call") made.push(folded(callTitle(calls.slice(call, ++call)), "call", content));
      else if (kind === "think" || stop - start > LONG) made.push(folded(`${kind} · ${plural(stop - start, "token")}`, kind, content));
      else made.push(...content());
    }
    return [...made, ...(turn.rest ? [make("p", { class: "more small" }, ...rest(turn.rest))] : [])];
  }
  /** Markers belong to what is before them. */
  function joined(spans) {
    return spans.reduce((made, [kind, start, stop]) => {
      if (kind === "special" && made.length) made.at(-1)[2] = stop;
      else made.push([kind, start, stop]);
      return made;
    }, []);
  }
  function callTitle(calls) {
    const parts = calls.map(([tool, given], i) => make("span", {}, i ? "; " : "", make("span", { class: "tool" }, tool),
      ...given.flatMap(([key, value]) => [" ", key ? make("span", { class: "key" }, `${key}=`) : "", value])));
    return make("span", { class: "mono" }, ...(parts.length ? parts : ["call"]));
  }
  function tokens(turn, start, stop, kind) {
    let at = turn.sizes.slice(0, start).reduce((a, b) => a + b, 0);
    const out = (i) => (turn.unlearned ?? []).some(([from, to]) => from <= i && i < to);
    return turn.sizes.slice(start, stop).map((size, j) => {
      const i = start + j;
      const value = valueOf(turn, colour.value, i);
      const made = make("span", { class: `t${kind === "forced" || out(i) ? " masked" : ""}`, "data-i": i },
        turn.text.slice(at, (at += size)));
      if (value !== undefined && colour.value !== "none") made.style.background = shade(colour.value, value);
      return made;
    });
  }
  function creditParts(turn, body) {
    const given = (turn.credit ?? []).flatMap((text, i) => (text ? [[body.columns[i], text]] : []));
    const masked = (turn.unlearned ?? []).reduce((sum, [from, to]) => sum + to - from, 0);
    const n = turn.sizes?.length ?? 0;
    const facts = given.slice(0, 3).map(([name, text]) => `${name} ${text}`);
    if (masked) facts.push(masked >= n && n ? "not learned from" : `${plural(masked, "token")} not learned from`);
    if (!facts.length) return [];
    return [folded(`credit · ${facts.join(" · ")}`, "credit", () => [make("dl", { class: "credit-list" },
      given.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text))))])];
  }
  function observation(turn) {
    const [text, more] = turn.observation;
    if (!text) return [];
    return [folded(`observation · ${firstLine(text)}`, "seen",
      () => [make("div", { class: "observation mono" }, text, ...rest(more))])];
  }
  function correction(repair, number) {
    const words = { "-": "removed: ", "+": "added: ", "=": "" };
    const pieces = repair.diff.map(([sign, text]) => make({ "-": "del", "+": "ins", "=": "span" }[sign], {},
      words[sign] ? make("span", { class: "sr" }, words[sign]) : "", text));
    const proof = repair.proof.map(([label, wins, played, auditWins, audited]) => make("div", { class: "trial small" },
      `${label}: ${wins} of ${plural(played, "rollout")} succeed`
        + (audited === undefined ? "" : `; in an audit ${auditWins} of ${audited}`),
      track(wins / Math.max(1, played))));
    return make("section", { class: "proposal" },
      make("h4", {}, number ? `A run after that failed, too. Instead of its turn ${repair.turn}, ` : "Instead, ", `by ${repair.by} `,
        badge(repair.accepted ? "accepted" : "rejected", repair.accepted ? "good" : "")),
      make("div", { class: "diff mono" }, pieces), ...proof,
      repair.better === null ? "" : make("p", { class: "small muted" }, `better with probability ${repair.better.toFixed(3)}`));
  }
  function track(share) {
    const bar = make("i");
    bar.style.width = `${100 * share}%`;
    return make("span", { class: "track", "aria-hidden": "true" }, bar);
  }

  // ---- single tokens
  function inspect(element) {
    state.token?.classList.remove("chosen");
    state.token = element;
    element.classList.add("chosen");
    const place = Number(element.closest("li.turn").id.slice(5));
    const turn = state.body.turns[place - 1];
    const i = Number(element.dataset.i);
    const facts = Object.entries(MODES).flatMap(([name, mode]) => {
      const value = valueOf(turn, name, i);
      return value === undefined ? [] : [`${mode.title.toLowerCase().replace("kl", "KL")} ${nats(value)}${mode.unit ? " " + mode.unit : ""}`];
    });
    if (element.classList.contains("masked")) facts.push("not learned from");
    const shown = element.textContent.replace(/\n/g, "↵").replace(/ /g, "·");
    info.replaceChildren(`Turn ${place}, token ${i + 1} of ${turn.sizes.length} `, make("code", {}, shown),
      facts.length ? `: ${facts.join(", ")}` : "");
    info.hidden = false;
  }
  function stepToken(by) {
    const turn = article.querySelector(`#turn-${state.turn || 1}`);
    if (!turn?.querySelector(".t")) for (const one of turn?.querySelectorAll("details.fold:not(.seen, .credit)") ?? []) {
      one.fill();
      one.open = true;
    }
    const all = [...(turn?.querySelectorAll(".t") ?? [])];
    if (!all.length) return;
    const at = all.indexOf(state.token);
    inspect(all[at < 0 ? (by > 0 ? 0 : all.length - 1) : Math.min(Math.max(at + by, 0), all.length - 1)]);
    state.token.closest("details")?.setAttribute("open", "");
    state.token.scrollIntoView({ block: "nearest" });
  }
  function goToTurn(number) {
    const turns = article.querySelectorAll("li.turn");
    if (!turns.length) return;
    state.turn = Math.min(Math.max(number, 1), turns.length);
    const turn = turns[state.turn - 1];
    turn.focus({ preventScroll: true });
    turn.scrollIntoView({ block: "nearest" });
  }
  function goToError() {
    const turn = article.querySelector("li.turn.earliest");
    if (turn) goToTurn(Number(turn.id.slice(5)));
  }
  function recolour(name) {
    colour.value = state.wanted = name;
    const opened = [...article.querySelectorAll("details.fold")].map((one) => one.open);
    draw();
    [...article.querySelectorAll("details.fold")].forEach((one, i) => {
      if (opened[i]) one.fill();
      one.open = opened[i];
    });
  }
  function nextColour() {
    const names = [...colour.options].filter((option) => !option.disabled).map((option) => option.value);
    recolour(names[(names.indexOf(colour.value) + 1) % names.length]);
  }
  function toggleHelp() {
    $("help").hidden = !$("help").hidden;
    $("keys").setAttribute("aria-expanded", !$("help").hidden);
  }

  // ---- keys, while the focus is in the viewer
  const inList = { ArrowDown: () => state.at + 1, ArrowUp: () => state.at - 1, Home: () => 0,
    End: () => state.shown.length - 1, PageDown: () => state.at + 10, PageUp: () => state.at - 10 };
  const anywhere = {
    j: () => select(state.at + 1), k: () => select(state.at < 0 ? 0 : state.at - 1),
    n: () => goToTurn(state.turn + 1), p: () => goToTurn(state.turn - 1), e: goToError,
    c: nextColour, x: () => fold(!state.unfolded), "/": () => filters.find.focus(), "?": toggleHelp,
    ArrowRight: () => stepToken(1), ArrowLeft: () => stepToken(-1),
  };
  viewer.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const field = event.target.closest("input, select");
    if (field) {
      if (event.key === "Escape" || (event.key === "Enter" && field === filters.find)) list.focus();
      if (event.key === "Enter") event.preventDefault();
      return;
    }
    if (event.target === list && event.key in inList) select(inList[event.key]());
    else if (event.target === list && event.key === "Enter") article.focus();
    else if (event.key in anywhere) anywhere[event.key]();
    else return;
    event.preventDefault();
  });
  let drawing = 0;
  list.addEventListener("scroll", () => {
    cancelAnimationFrame(drawing);
    drawing = requestAnimationFrame(drawList);
  });
  list.addEventListener("click", (event) => {
    const found = event.target.closest(".row");
    if (found) select(Number(found.id.slice(4)));
  });
  article.addEventListener("click", (event) => {
    const turn = event.target.closest("li.turn");
    if (turn) state.turn = Number(turn.id.slice(5));
    if (event.target.matches(".t")) inspect(event.target);
  });
  article.addEventListener("focusin", (event) => {
    const turn = event.target.closest("li.turn");
    if (turn) state.turn = Number(turn.id.slice(5));
  });
  filters.addEventListener("input", applyFilters);
  filters.addEventListener("submit", (event) => event.preventDefault());
  colour.addEventListener("change", () => recolour(colour.value));
  $("unfold").addEventListener("click", () => fold(!state.unfolded));
  $("earliest").addEventListener("click", goToError);
  $("keys").addEventListener("click", toggleHelp);
  window.addEventListener("hashchange", openAddress);
  window.addEventListener("resize", drawList);

  viewer.hidden = false;
  fillFilters();
  fillColours();
  applyFilters();
  if (!openAddress()) open(rows.find((row) => data.sample[row.place]) ?? rows[0], { address: false });
})();
