"""The page's frame, style and script. The page loads nothing: its policy forbids it."""

import base64
import hashlib

# Sorts a table by the column whose head is clicked; the page is complete without it.
SCRIPT = """\
for (const head of document.querySelectorAll("th")) {
  head.tabIndex = 0;
  const sort = () => {
    const body = head.closest("table").tBodies[0];
    const column = head.cellIndex;
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      const isEmpty = (text) => text === "\u2013";
      if (isEmpty(x) || isEmpty(y)) return isEmpty(x) - isEmpty(y);
      const difference = Number(x) - Number(y);
      return sign * (Number.isNaN(difference) ? x.localeCompare(y) : difference);
    };
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    body.append(...[...body.rows].sort(compare));
  };
  head.addEventListener("click", (event) => event.target.closest("a") || sort());
  head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
}
"""

STYLE = """\
:root { color-scheme: light dark; --page: #fff; --panel: #f6f7f9; --text: #1b1f24;
  --faint: #656d76; --line: #d9dee3; --link: #1f6fc4; --good: #1a7f4b; --busy: #1f6fc4;
  --bad: #c93030; --idle: #8a6d00; }
@media (prefers-color-scheme: dark) { :root { --page: #12151a; --panel: #1a1f26; --text: #dfe4ea;
  --faint: #97a1ad; --line: #313943; --link: #6eb0f5; --good: #4cc38a; --busy: #6eb0f5;
  --bad: #ff7b72; --idle: #d9b44a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.5rem 4rem; max-width: 84rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
p, .faint { color: var(--faint); margin: .25rem 0 .75rem; max-width: 60rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin-top: .5rem; }
.charts + .scroll, .legend + .scroll { margin-top: 1rem; }
.scroll { overflow-x: auto; max-height: 85vh; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: .35rem .7rem; text-align: left; vertical-align: top; unicode-bidi: isolate;
  border-bottom: 1px solid var(--line); max-width: 32rem; overflow-wrap: break-word; }
th { position: sticky; top: 0; background: var(--panel); font-weight: 600; cursor: pointer;
  z-index: 1; overflow-wrap: normal; max-width: 9rem; }
th[aria-sort="ascending"]::after { content: " \u2191"; }
th[aria-sort="descending"]::after { content: " \u2193"; }
tbody tr:last-child td { border-bottom: 0; }
tbody tr:hover { background: var(--panel); }
td:first-child { min-width: 20rem; overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.none { color: var(--faint); }
.swatch { width: 22px; height: 10px; margin-right: .4rem; vertical-align: baseline; }
.status { white-space: nowrap; font-weight: 600; }
.finished { color: var(--good); } .running { color: var(--busy); }
.failed { color: var(--bad); } .unfinished { color: var(--idle); }
.legend { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr));
  gap: .1rem 1.2rem; font-size: 12.5px; line-height: 1.35; padding: .5rem 0; margin-bottom: .5rem;
  position: sticky; top: 0; z-index: 2; background: var(--page); max-height: 9rem;
  overflow-y: auto; }
.legend label { cursor: pointer; overflow-wrap: anywhere; }
.legend input { margin: 0 .3rem 0 0; vertical-align: -1px; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--panel); border-radius: 6px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure > svg { display: block; width: 100%; height: auto; }
figcaption { font-size: 13.5px; font-weight: 600; margin-bottom: .4rem; overflow-wrap: anywhere; }
ul.notes { margin: .4rem 0; padding-left: 1.2rem; color: var(--bad); overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem;
  margin: .4rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
details > .scroll { margin: .6rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; font-size: 13px;
  unicode-bidi: isolate; max-height: 24rem; overflow-y: auto; }
pre b { color: var(--link); }
"""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style$run_style</style>
</head>
<body>
$body
<script>$script</script>
</body>
</html>
"""


def policy() -> str:
    """The content security policy: nothing from the network, no script but `SCRIPT`."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
