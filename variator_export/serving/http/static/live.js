"use strict";

// Draws what /live.json tells, once a second. `since` asks only for the seconds that this page lacks.
const SECONDS = 300;
const MINUTE = 60;
const COLOURS = 6;
const MARGIN = { left: 44, right: 8, top: 8, bottom: 20 };
const find = (id) => document.getElementById(id);
let known = new Map();
let key = sessionStorage.getItem("key");

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// A rounded number above a maximum, so that the axis has readable steps.
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

class Chart {
  constructor(id, most, unit) {
    this.svg = find(id);
    this.width = this.svg.clientWidth - MARGIN.left - MARGIN.right;
    this.height = this.svg.clientHeight - MARGIN.top - MARGIN.bottom;
    this.most = most;
    this.svg.replaceChildren();
    for (const share of [0, 0.5, 1]) {
      const y = this.y(most * share);
      this.svg.append(
        element("line", { class: "grid", x1: MARGIN.left, x2: MARGIN.left + this.width, y1: y, y2: y }),
        element("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, +(most * share).toPrecision(3) + unit),
      );
    }
    for (const ago of [SECONDS, SECONDS / 2, 0]) {
      const anchor = ago === SECONDS ? "start" : ago ? "middle" : "end";
      const text = ago ? `${ago / MINUTE} min ago` : "now";
      this.svg.append(
        element("text", { x: this.x(-ago), y: this.height + MARGIN.top + 16, "text-anchor": anchor }, text),
      );
    }
  }
  x(second) { return MARGIN.left + this.width * (1 + second / SECONDS); }
  y(value) { return MARGIN.top + this.height * (1 - Math.min(value / this.most, 1)); }

  // A line that breaks where there was nothing to measure.
  line(points, name) {
    let path = "";
    let previous = null;
    for (const [second, value] of points) {
      if (value !== null) {
        const joined = previous !== null && second - previous <= 5;
        path += `${joined ? "L" : "M"}${this.x(second).toFixed(1)} ${this.y(value).toFixed(1)}`;
        previous = second;
      }
    }
    this.svg.append(element("path", { class: name, d: path }));
  }
  bar(second, from, to, name) {
    const width = Math.max(this.width / SECONDS, 1);
    const top = this.y(to);
    this.svg.append(
      element("rect", { class: name, x: this.x(second) - width, y: top, width, height: Math.max(this.y(from) - top, 0) }),
    );
  }
  across(value, name) {
    this.svg.append(
      element("line", { class: name, x1: MARGIN.left, x2: MARGIN.left + this.width, y1: this.y(value), y2: this.y(value) }),
    );
  }
}

function draw(live) {
  const seconds = [];
  for (let ago = SECONDS; ago > 0; ago--) {
    const found = known.get(live.now - ago);  // the present second is not over yet
    if (found) seconds.push([-ago, found]);
  }
  const colour = (ratio) => `k${live.ratios.indexOf(ratio) % COLOURS}`;
  const load = new Chart("load", ceiling(Math.max(1, ...seconds.map(([, s]) => s.texts))), "");
  const share = new Chart("ratio", 100, " %");
  for (const [second, found] of seconds) {
    let below = 0;
    for (const ratio of live.ratios) {
      const texts = found.ratios[ratio] || 0;
      if (!texts) continue;
      load.bar(second, below, below + texts, colour(ratio));
      share.bar(second, (100 * below) / found.texts, (100 * (below + texts)) / found.texts, colour(ratio));
      below += texts;
    }
  }
  const slowest = Math.max(live.goal_ms * 1.25, ...seconds.map(([, s]) => s.p99 || 0));
  const latency = new Chart("latency", ceiling(slowest), "");
  latency.line(seconds.map(([second, s]) => [second, s.p50]), "median");
  latency.line(seconds.map(([second, s]) => [second, s.p99]), "slow");
  latency.across(live.goal_ms, "goal");
  const losses = live.losses.filter((loss) => loss !== null);
  const quality = new Chart("quality", ceiling(Math.max(0.1, 100 * Math.max(0, ...losses))), " %");
  if (losses.length) quality.line(seconds.map(([second, s]) => [second, s.lost === null ? null : 100 * s.lost]), "median");
  numbers(live, seconds.filter(([second]) => second >= -MINUTE).map(([, s]) => s));
}

function numbers(live, minute) {
  const sum = (name) => minute.reduce((total, second) => total + second[name], 0);
  const [requests, refused, texts] = ["requests", "refused", "texts"].map(sum);
  const asked = requests + refused;
  const seconds = Math.max(Math.min(MINUTE, live.now), 1);
  const lost = minute.reduce((total, s) => total + (s.lost || 0) * s.texts, 0);
  const knows = live.losses.every((loss) => loss !== null);
  find("rate").textContent = (requests / seconds).toFixed(1);
  find("goal").textContent = `${live.goal_ms} ms`;
  find("within").textContent = asked ? `${((100 * sum("within")) / asked).toFixed(1)} %` : "–";
  find("p99").textContent = requests ? `${Math.max(...minute.map((s) => s.p99 || 0)).toFixed(0)} ms` : "–";
  find("metric").textContent = live.metric || "quality";
  find("lost").textContent = !knows ? "not known" : texts ? `${((100 * lost) / texts).toFixed(2)} %` : "–";
  find("refused").textContent = asked ? `${((100 * refused) / asked).toFixed(1)} %` : "–";
  find("queue").textContent = live.queue;
  find("legend").replaceChildren(...live.ratios.map((ratio, index) => {
    const entry = document.createElement("span");
    const square = element("svg", { viewBox: "0 0 1 1" });
    square.append(element("rect", { class: `k${index % COLOURS}`, width: 1, height: 1 }));
    entry.append(square, typeof ratio === "string" ? ratio : `ratio ${ratio}`);
    return entry;
  }));
}

function say(text, lost) {
  find("state").textContent = text;
  find("state").classList.toggle("lost", lost);
}

async function poll() {
  const last = Math.max(0, ...known.keys());
  try {
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const response = await fetch(`live.json?since=${last}`, { headers, cache: "no-store" });
    find("ask").hidden = response.status !== 401;
    if (response.status === 401) {
      say(key ? "the key is wrong" : "locked", Boolean(key));
      return;
    }
    const live = await response.json();
    if (live.now < last) known = new Map();  // another process answers
    for (const second of live.seconds) known.set(second.at, second);
    for (const at of known.keys()) if (at < live.now - SECONDS) known.delete(at);
    find("model").textContent = live.model;
    say("live", false);
    draw(live);
  } catch {
    say("the server does not answer", true);
  }
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("key").value.trim();
  sessionStorage.setItem("key", key);
  poll();
});
setInterval(poll, 1000);
poll();
