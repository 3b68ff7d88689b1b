// Opens TensorBoard in headless Chromium as a user would and prints what is there, as JSON:
//   node open_tensorboard.js URL CHROMIUM SCREENSHOT
// `curves`: titles of the scalar charts, each with a screenshot of its plot; `pictures`: titles and widths of pictures;
// `dashboard`: the charts of each category of the custom scalars (SCREENSHOT.dashboard.png) that fit on the first page;
// `settings`: the head of the HParams table (SCREENSHOT.hparams.png); `config`: the beginning of the text.
const { chromium } = require("playwright-core");

const [url, executablePath, screenshot] = process.argv.slice(2);

async function main() {
  const args = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"];
  const browser = await chromium.launch({ executablePath, args });
  try {
    const page = await browser.newPage({ viewport: { width: 1360, height: 1180 } });
    const filter = encodeURIComponent("loss/|validation/|heldout/|negatives/");
    await page.goto(`${url}/?tagFilter=${filter}#timeseries`, { waitUntil: "domcontentloaded" });
    await page.waitForSelector("scalar-card", { timeout: 90000 });
    await page.waitForSelector("image-card img", { timeout: 90000 });
    await page.getByRole("button", { name: "Settings" }).last().click();
    await page.waitForTimeout(5000);
    await page.screenshot({ path: screenshot });
    await page.setViewportSize({ width: 1360, height: 2400 }); // cards out of sight are not made
    await page.waitForTimeout(5000);
    const title = async (card) => (await card.locator("tb-truncated-path").first().innerText()).replace(/\s/g, "");
    const curves = [];
    for (const card of await page.locator("scalar-card").all()) {
      // The lines are drawn on a canvas of which a script cannot read the pixels: the reader looks at a picture of it.
      const path = `${screenshot}.${curves.length}.png`;
      await card.scrollIntoViewIfNeeded();
      await page.waitForTimeout(1500);
      await card.locator("canvas").first().screenshot({ path });
      curves.push({ title: await title(card), path });
    }
    const pictures = [];
    for (const card of await page.locator("image-card").all()) {
      await card.scrollIntoViewIfNeeded();
      const image = card.locator("img").first();
      await image.waitFor({ timeout: 30000 });
      const width = await image.evaluate((element) => (element.complete ? element.naturalWidth : 0));
      pictures.push({ title: await title(card), width });
    }
    const open = async (tab, height) => {
      const other = await browser.newPage({ viewport: { width: 1360, height } });
      await other.goto(`${url}/#${tab}`, { waitUntil: "domcontentloaded" });
      return other;
    };
    const first = await open("custom_scalars", 1180);
    await first.waitForSelector("tf-custom-scalar-multi-line-chart-card", { timeout: 90000 });
    await first.waitForTimeout(8000);
    await first.screenshot({ path: `${screenshot}.dashboard.png` });
    const dashboard = {};
    for (const pane of await first.locator("tf-category-paginated-view").all()) {
      const box = await pane.boundingBox();
      const cards = await pane.locator("tf-custom-scalar-multi-line-chart-card").count();
      const heading = (await pane.locator(".heading").first().innerText()).split("\n")[0].trim();
      if (box && box.y + 300 < 1180) dashboard[heading] = cards;
    }
    const table = await open("hparams", 700);
    await table.waitForSelector("vaadin-grid", { timeout: 90000 });
    await table.waitForTimeout(5000);
    await table.screenshot({ path: `${screenshot}.hparams.png` });
    const settings = await table.locator("vaadin-grid").first().innerText();
    const text = await open("text", 700);
    const config = (await text.locator("tf-text-dashboard pre").first().innerText({ timeout: 90000 })).slice(0, 200);
    console.log(JSON.stringify({ curves, pictures, dashboard, settings, config }));
  } finally {
    await browser.close();
  }
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
