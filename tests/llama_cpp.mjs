// Runs a GGUF file in a real llama.cpp. Reads one JSON object from stdin, writes one to stdout:
//     in   {"model": path, "texts": [text, ...], "prompt": [id, ...], "steps": n}
//     out  {"ids": [[id, ...] for each text], "tokens": [the n greedy tokens after the prompt]}
// Needs the npm package node-llama-cpp, with a prebuilt llama.cpp, in the node_modules of $NODE_LLAMA_CPP_DIR.
import {createRequire} from "node:module";
import {text} from "node:stream/consumers";
import {pathToFileURL} from "node:url";

const require = createRequire(`${process.env.NODE_LLAMA_CPP_DIR}/`);
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const {model: modelPath, texts, prompt, steps} = JSON.parse(await text(process.stdin));

const llama = await getLlama({gpu: false, maxThreads: 1, build: "never", logLevel: "error", progressLogs: false});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: model.trainContextSize,
    flashAttention: false, // llama.cpp keeps keys and values in float16 unless told otherwise
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32"
});
const tokens = [];
// Temperature 0 is greedy. A model with random weights may choose end-of-text at any step; keep generating after it.
for await (const token of context.getSequence().evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    tokens.push(token);
    if (tokens.length === steps) break;
}
process.stdout.write(JSON.stringify({ids: texts.map((t) => model.tokenize(t, false)), tokens}));
await llama.dispose();
