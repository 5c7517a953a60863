"""What is done to an element inside the page. Each is a function whose ``this`` is the element."""


def if_there(script: str) -> str:
    """``script`` for an element that may have been taken from the page: gives ``gone`` or the ``value``."""
    return (
        "function(...given) { return this.isConnected"
        f" ? {{value: ({script}).apply(this, given)}} : {{gone: true}}; }}"
    )


# Where to click so that a real pointer hits the element; null if something else lies over all of it.
POINT = """function() {
  this.scrollIntoView({block: "nearest", inline: "nearest", behavior: "instant"});
  for (const box of this.getClientRects()) {
    const x = box.x + box.width / 2, y = box.y + box.height / 2;
    const hit = document.elementFromPoint(x, y);
    if (!hit || !(this.contains(hit) || hit.closest("label")?.control === this)) continue;
    const point = [x, y];
    for (let frame = window.frameElement; frame; frame = frame.ownerDocument.defaultView.frameElement) {
      const outer = frame.getBoundingClientRect();
      point[0] += outer.x + frame.clientLeft;
      point[1] += outer.y + frame.clientTop;
    }
    return point;
  }
  return null;
}"""

CLICK = """function() {
  if (this.click) this.click();
  else this.dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true}));
}"""

# Returns "type" where the text is to be typed, otherwise what is wrong, or "" when it is done.
FILL = """function(text) {
  const set = ["date", "time", "datetime-local", "month", "week", "color", "range"];
  if (this.disabled || this.readOnly) return "it cannot be changed";
  if (this.isContentEditable) {
    this.focus();
    getSelection().selectAllChildren(this);
    return "type";
  }
  const box = this instanceof HTMLInputElement, kind = this.type;
  if (box && set.includes(kind)) {
    const before = this.value;
    this.value = text;
    if (this.value !== text && !(kind === "range" && Number(this.value) === Number(text))) {
      this.value = before;
      const form = {date: "2025-12-31", time: "18:30", "datetime-local": "2025-12-31T18:30",
                    month: "2025-12", week: "2025-W52", color: "#ff0000", range: "7"}[kind];
      return "it takes a value such as " + form;
    }
    this.dispatchEvent(new Event("input", {bubbles: true}));
    this.dispatchEvent(new Event("change", {bubbles: true}));
    return "";
  }
  const texts = ["text", "search", "email", "url", "tel", "password", "number"];
  if (this instanceof HTMLTextAreaElement || (box && texts.includes(kind))) {
    this.focus();
    this.select();
    return "type";
  }
  return "it is no text field";
}"""

# Returns "" when it is done, otherwise what is wrong.
SELECT = """function(wanted) {
  if (!(this instanceof HTMLSelectElement)) return "it offers no options";
  if (this.disabled) return "it cannot be changed";
  const plain = (text) => text.trim().replace(/\\s+/g, " ");
  const options = [...this.options].filter((option) => !option.disabled);
  const found = options.find((o) => plain(o.label) === plain(wanted))
    || options.find((o) => o.value === wanted);
  if (!found) {
    const shown = options.slice(0, 20).map((o) => plain(o.label)).join(", ");
    return "no such option; it has: " + shown + (options.length > 20 ? ", ..." : "");
  }
  if (!found.selected) {
    found.selected = true;
    this.dispatchEvent(new Event("input", {bubbles: true}));
    this.dispatchEvent(new Event("change", {bubbles: true}));
  }
  return "";
}"""

# Handlers that run at once have run when this is done, and a form has been sent. A page may have replaced its
# timers, so none is used.
SETTLED = """async () => {
  for (let round = 0; round < 3; round++) {
    const channel = new MessageChannel();
    const passed = new Promise((done) => { channel.port1.onmessage = done; });
    channel.port2.postMessage(0);
    await passed;
  }
}"""
