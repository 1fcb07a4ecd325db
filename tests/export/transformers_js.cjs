// The rows and scores of transformers.js: node transformers_js.cjs FOLDER DTYPE PICTURE TEXTS-AS-JSON
const js = require("@huggingface/transformers");
const { basename, dirname } = require("path");
const [folder, dtype, picture, words] = process.argv.slice(2);
const [name, texts] = [basename(folder), JSON.parse(words)];

async function main() {
  js.env.allowRemoteModels = false;
  js.env.localModelPath = dirname(folder);
  const tokens = (await js.AutoTokenizer.from_pretrained(name))(texts, { padding: true, truncation: true });
  const { text_embeds } = await (await js.CLIPTextModelWithProjection.from_pretrained(name, { dtype }))(tokens);
  const pixels = await (await js.AutoProcessor.from_pretrained(name))(await js.RawImage.read(picture));
  const { image_embeds } = await (await js.CLIPVisionModelWithProjection.from_pretrained(name, { dtype }))(pixels);
  const classify = await js.pipeline("zero-shot-image-classification", name, { dtype });
  const scores = await classify(picture, texts, { hypothesis_template: "{}" });
  console.log(JSON.stringify([text_embeds.tolist(), image_embeds.tolist(), scores]));
}

main();
