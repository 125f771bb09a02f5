// Draws /status every second: the load, the KV cache with its prefix tree, and the requests.
// Text is only ever set as text, and styles as properties, as the page's security policy wants.

const POLL_MS = 1000;
const TIMEOUT_MS = 10_000;
const HISTORY_S = 300; // of the sparkline
const SHORTEST_S = 30; // that it shows
const MEAN_S = 5; // of the rate that is shown as a number
const SVG = "http://www.w3.org/2000/svg";

const stateLine = document.getElementById("state");
const histories = new Map(); // server name -> samples of tokens, oldest first
let polling = false;
let timer; // of the next poll

const MILLIONS = { notation: "compact", maximumSignificantDigits: 3 };
const count = (number) => Math.round(number).toLocaleString("en", number < 1e6 ? {} : MILLIONS);
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
const percent = (part, whole) => `${whole ? (100 * part) / whole : 0}%`;

/** An element with classes and children, which are elements or texts. */
function element(tag, classes, ...children) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** A picture of which `text` says the same. */
function picture(classes, text, ...children) {
  const made = element("div", classes, ...children);
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", text);
  return made;
}

/** A bar whose `side` ("width" or "height") is a share of its container's. */
function bar(classes, side, share) {
  const made = element("span", classes);
  made.style[side] = share;
  return made;
}

async function poll() {
  if (polling || document.hidden) return;
  polling = true;
  try {
    const options = { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) };
    const response = await fetch("status", options);
    if (!response.ok) throw new Error(`status ${response.status}`);
    show(await response.json());
  } catch (error) {
    say("failed", "not reachable, trying again");
    document.body.classList.add("stale");
    console.info(String(error));
  }
  polling = false;
  clearTimeout(timer); // that of before the page was hidden
  timer = setTimeout(poll, POLL_MS);
}

/** Set the server's state; screen readers hear it only when it changes. */
function say(name, text) {
  stateLine.className = name;
  if (stateLine.textContent !== text) stateLine.textContent = text;
}

function show(status) {
  const servers = Object.entries(status.replicas ?? { "": status });
  say(status.state, status.state);
  document.body.classList.remove("stale");
  for (const name of histories.keys()) {
    if (!servers.some(([known]) => known === name)) histories.delete(name);
  }
  const drawn = servers.map(([name, server]) => drawServer(name, server));
  document.getElementById("servers").replaceChildren(
    ...drawn,
    leftOut(status.replicas_left_out, "replica") ?? "",
  );
}

function drawServer(name, server) {
  const { engine } = server;
  const replica = name ? `Replica ${name}: ${server.state}` : "";
  const title = element("h2", "", server.model, element("span", "quiet", replica));
  const section = element("section", "server", title);
  if (!engine) {
    section.append(element("p", "", "The engine has not answered yet: it is in a long step."));
    return section;
  }
  if (server.age_s > 2) {
    const age = `The engine is in a long step: these numbers are ${count(server.age_s)} s old.`;
    section.append(element("p", "note", age));
  }
  section.append(drawLoad(server, sample(name, engine)), drawKv(engine), drawProblems(engine));
  return section;
}

function leftOut(number, noun) {
  return number ? element("p", "quiet", `${plural(number, noun)} more, not shown`) : null;
}

/** The server's samples, with that of `engine`. */
function sample(name, engine) {
  let samples = histories.get(name) ?? [];
  const last = samples.at(-1);
  if (last && engine.tokens < last.tokens) samples = []; // the server has been restarted
  if (!last || engine.at > last.at || !samples.length) {
    samples.push({ at: engine.at, tokens: engine.tokens });
  }
  samples = samples.filter(({ at }) => at >= engine.at - HISTORY_S);
  histories.set(name, samples);
  return samples;
}

function rate(from, to) {
  return to.at > from.at ? (to.tokens - from.tokens) / (to.at - from.at) : 0;
}

function drawLoad(server, samples) {
  const { engine } = server;
  const last = samples.at(-1);
  const recent = samples.find(({ at }) => at >= last.at - MEAN_S);
  const now = samples.length > 1 ? count(rate(recent, last)) : "–";
  const speed = tile("Tokens per second", now, drawSparkline(samples));
  speed.classList.add("wide");
  return element(
    "dl",
    "tiles",
    speed,
    tile("Requests running", count(server.running), `${count(server.waiting)} waiting`),
    tile("Rollouts running", count(engine.running), `${count(engine.waiting)} waiting`),
    tile("KV pages free", count(engine.kv.free), `of ${count(engine.kv.total)}`),
    tile("Tokens generated", count(engine.tokens), `in ${plural(engine.steps, "step")}`),
  );
}

function tile(name, value, detail) {
  const shown = element("dd", "", element("strong", "", value), detail);
  return element("div", "tile", element("dt", "", name), shown);
}

/** Tokens per second over the last minutes. */
function drawSparkline(samples) {
  const rates = samples.slice(1).map((to, i) => ({ at: to.at, value: rate(samples[i], to) }));
  const end = samples.at(-1).at;
  const span = Math.max(SHORTEST_S, end - samples[0].at);
  const peak = Math.max(...rates.map(({ value }) => value), 1);
  const points = rates.map(
    ({ at, value }) =>
      `${(300 * (1 - (end - at) / span)).toFixed(1)},${(39 - (37 * value) / peak).toFixed(1)}`,
  );
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 300 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "polyline");
  line.setAttribute("points", points.join(" "));
  svg.append(line);
  const length = span < 90 ? `${count(span)} s` : `${count(span / 60)} min`;
  const highest = rates.length ? `, highest ${count(peak)}` : "";
  return element("span", "spark", svg, `last ${length}${highest}`);
}

function drawKv({ kv, nodes, nodes_left_out }) {
  const parts = [
    ["prompts", kv.prompts],
    ["rollouts", kv.rollouts],
    ["kept", kv.kept],
    ["free", kv.free],
  ];
  const text = parts.map(([name, pages]) => `${name} ${count(pages)}`).join(", ");
  const bars = parts.map(([name, pages]) => bar(name, "width", percent(pages, kv.total)));
  const legend = parts.map(([name, pages]) =>
    element("li", "", element("span", `key ${name}`), `${name} ${count(pages)}`),
  );
  const pages = `${plural(kv.total, "page")} of ${plural(kv.page_tokens, "token")}`;
  return element(
    "section",
    "kv",
    element("h3", "", "KV cache ", element("span", "quiet", pages)),
    picture("stack", `KV pages: ${text}`, ...bars),
    element("ul", "legend", ...legend),
    drawTree(nodes),
    leftOut(nodes_left_out, "node"),
  );
}

/** The prefix tree: a node begins where its parent ends, and its rollouts where it ends. */
function drawTree(nodes) {
  if (!nodes.length) return element("p", "quiet", "The prefix tree is empty.");
  const ids = new Set(nodes.map(({ id }) => id));
  const end = ({ start, tokens, branches }) => start + tokens + Math.max(0, ...branches);
  const longest = Math.max(1, ...nodes.map(end));
  const kept = (node) => node.state === "kept";
  const below = (parent, depth) =>
    nodes
      .filter((node) => (ids.has(node.parent) ? node.parent : null) === parent)
      .sort((one, other) => kept(one) - kept(other) || one.id - other.id)
      .map((node) => drawNode(node, longest, depth, below(node.id, depth + 1)));
  const scale = element(
    "p",
    "scale quiet",
    element("span", "", "token 0"),
    element("span", "", count(longest)),
  );
  const title = element("h4", "", "Prefix tree");
  return element("div", "tree", title, scale, element("ul", "", ...below(null, 0)));
}

function drawNode(node, longest, depth, children) {
  const readers = node.running ? plural(node.running, "rollout") : node.state;
  const size = `${plural(node.tokens, "token")}, ${plural(node.pages, "page")}`;
  const label = element("p", "label", element("strong", "", readers), `${requests(node)}, ${size}`);
  label.style.paddingLeft = `${depth}rem`;
  const share = (tokens) => percent(tokens, longest);
  const above = bar("above", "width", share(node.start));
  const kind = node.state === "kept" ? "kept" : "prompts";
  const block = bar(`block ${kind}`, "width", share(node.tokens));
  block.style.left = share(node.start);
  const branches = node.branches.map((tokens) => bar("rollouts", "width", share(tokens)));
  for (const branch of branches) branch.style.marginLeft = share(node.start + node.tokens);
  const track = element("div", "track", above, block, ...branches);
  track.setAttribute("aria-hidden", "true");
  const list = children.length ? element("ul", "", ...children) : null;
  return element("li", "", element("div", "row", label, track), list);
}

/** The requests that read a node. */
function requests({ problems, problems_left_out }) {
  if (!problems.length) return "";
  const noun = problems.length > 1 ? "requests" : "request";
  const more = problems_left_out ? ` and ${count(problems_left_out)} more` : "";
  return ` of ${noun} ${problems.join(", ")}${more}`;
}

function drawProblems({ problems, problems_left_out }) {
  const cards = problems.map(drawProblem);
  return element(
    "section",
    "problems",
    element("h3", "", "Requests on the engine"),
    cards.length ? element("ul", "cards", ...cards) : element("p", "quiet", "None."),
    leftOut(problems_left_out, "request"),
  );
}

function drawProblem(problem) {
  const rounds = problem.widths.length;
  const names = problem.widths.map((width, i) =>
    problem.synthesis && i === rounds - 1 ? "synthesis" : plural(width, "rollout"),
  );
  const chips = names.map((name, i) => {
    const chip = element("li", i < problem.round ? "done" : i === problem.round ? "now" : "", name);
    if (i === problem.round) chip.setAttribute("aria-current", "step");
    return chip;
  });
  const legend = ["running", "ended", "waiting"].map((name) =>
    element("li", "", element("span", `key ${name}`), `${count(problem[name])} ${name}`),
  );
  const most = Math.max(1, ...problem.rollouts.map(({ tokens }) => tokens));
  const columns = problem.rollouts.map(({ state, tokens }) =>
    bar(`column ${state}`, "height", percent(tokens, most)),
  );
  const text = `Tokens of each rollout; the longest has ${count(most)}`;
  return element(
    "li",
    "card",
    element(
      "h4",
      "",
      `Request ${problem.number}`,
      element("span", "quiet", `${count(problem.seconds)} s`),
    ),
    element("ol", "rounds", ...chips),
    picture("columns", text, ...columns),
    element("ul", "legend", ...legend),
    leftOut(problem.rollouts_left_out, "rollout"),
    element(
      "p",
      "quiet",
      `prompt ${plural(problem.prompt_tokens, "token")}, generated ${count(problem.tokens)}`,
    ),
  );
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) {
    histories.clear(); // nothing is known of the time in between
    poll();
  }
});
poll();
