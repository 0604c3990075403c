// Airflow's colours, links that leave its frame, and a page that refreshes itself during a run.
"use strict";

function inFrame() {
  return window.parent !== window;
}

function followTheme() {
  const framed = inFrame() ? window.parent.document.documentElement.classList.contains("dark") : null;
  const own = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.classList.toggle("dark", framed ?? own);
}

followTheme();
if (inFrame()) {
  new MutationObserver(followTheme).observe(window.parent.document.documentElement, { attributeFilter: ["class"] });
} else {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", followTheme);
}

// The frame may not navigate Airflow's window, but a link in that window's own document may.
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[target=_top]");
  if (!link || !inFrame() || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const outer = window.parent.document.createElement("a");
  outer.href = link.href;
  window.parent.document.body.append(outer);
  outer.click();
  outer.remove();
});

async function refresh() {
  const going = document.querySelector("[data-refresh]");
  if (!going) return;
  if (!document.hidden) {
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (answer.ok) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        document.querySelector("main").replaceWith(page.querySelector("main"));
      }
    } catch {
      // Airflow restarts or the connection is lost: ask again
    }
  }
  setTimeout(refresh, 1000 * going.dataset.refresh);
}

addEventListener("DOMContentLoaded", () => {
  const going = document.querySelector("[data-refresh]");
  if (going) setTimeout(refresh, 1000 * going.dataset.refresh);
});
