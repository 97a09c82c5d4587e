// node classify.mjs HOST MODEL DTYPE IMAGE...: prints the answers of transformers.js as JSON.
import { env, pipeline } from '@huggingface/transformers';

const [host, model, dtype, ...images] = process.argv.slice(2);
env.remoteHost = host;
env.allowLocalModels = false;
env.cacheDir = './cache';
const classify = await pipeline('image-classification', model, { dtype });
const answers = [];
for (const image of images) answers.push(await classify(image, { top_k: 10 }));
console.log(JSON.stringify(answers));
