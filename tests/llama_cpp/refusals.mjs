// What llama.cpp answers: greedy continuations of prompts, as JSON on standard output.
//
//   node refusals.mjs MODEL.gguf PROMPTS.json [--chat | --tokenize] [--lora FILE] [--sequences N] [--threads N]
//
// PROMPTS.json: {"prompts":[{"id":"a","tokens":[1,2,3]}], "max_new_tokens":32, "end":[4]}
//   without "end", the model's own end-of-generation tokens end an answer
// --chat       prompts are {"id","text"[,"system"]}: llama.cpp renders the model's own chat template and tokenizes the result
// --tokenize   nothing is generated: the token ids of each prompt's "text" (special tokens parsed, no bos added)
// --lora FILE  with this adapter; --sequences N: how many prompts share a batch (default 1: a batch rounds differently
//              from one prompt alone, which near a tie picks another token, and saves little on small models)
// --threads N  default 1: more of them spin against each other where the machine has other work
//
// Out: {"answers":[{"id","text","tokens","ended"}]}, tokens without the one that ended the answer; with --chat also
// "rendered" and "prompt"; with --tokenize {"add_bos","texts":[{"id","tokens"}]}. Exit status 1 and a message when llama.cpp refuses the file.
import {readFileSync} from "node:fs";
import {parseArgs} from "node:util";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const {values: options, positionals} = parseArgs({
    allowPositionals: true,
    options: {
        chat: {type: "boolean"}, tokenize: {type: "boolean"},
        lora: {type: "string"}, sequences: {type: "string", default: "1"}, threads: {type: "string", default: "1"}
    }
});
if (positionals.length !== 2) {
    console.error("usage: node refusals.mjs MODEL.gguf PROMPTS.json [--chat | --tokenize] [--lora FILE] [--sequences N] [--threads N]");
    process.exit(2);
}
const [modelPath, promptsPath] = positionals;
const threads = Number(options.threads);
const input = JSON.parse(readFileSync(promptsPath, "utf8"));

let llama, model;
try {
    llama = await getLlama({
        build: "never", gpu: false, maxThreads: threads, skipDownload: true, progressLogs: false,
        logLevel: LlamaLogLevel.error, logger: (level, message) => process.stderr.write(`llama.cpp: ${message.trimEnd()}\n`)
    });
    model = await llama.loadModel({modelPath, vocabOnly: options.tokenize === true, checkTensors: options.tokenize !== true});
} catch (error) {
    console.error(`${modelPath}: ${error.message}`);
    process.exit(1);
}

function render({text, system}) {
    const messages = [{role: "user", content: text}];
    if (system != null)
        messages.unshift({role: "system", content: system});
    const template = model.fileInfo.metadata.tokenizer?.chat_template;
    if (template == null)
        throw new Error("the model has no chat template");
    // The library's own wrapper prefers a JavaScript engine; llama.cpp's is what its users get.
    return new llama._bindings.AddonJinjaRenderer(template).render({
        messages, add_generation_prompt: true,
        bos_token: model.tokens.bosString ?? "", eos_token: model.tokens.eosString ?? ""
    });
}

function chatTokens(rendered) {
    const tokens = model.tokenize(rendered, true);
    const {bos, shouldPrependBosToken} = model.tokens;
    return shouldPrependBosToken && bos != null && tokens[0] !== bos ? [bos, ...tokens] : tokens;
}

async function answerAll(prompts) {
    const limit = input.max_new_tokens ?? 32;
    const end = input.end == null ? null : new Set(input.end);
    const longest = Math.max(...prompts.map(({tokens}) => tokens.length)) + limit;
    const sequences = Math.max(1, Math.min(Number(options.sequences), prompts.length));
    const context = await model.createContext({
        contextSize: longest, sequences, batchSize: Math.max(512, longest), lora: options.lora, threads
    });
    const answers = new Array(prompts.length);
    let next = 0;
    async function worker(sequence) {
        while (next < prompts.length) {
            const index = next++;
            const {id, tokens: prompt, ...more} = prompts[index];
            const tokens = [];
            let ended = false;
            await sequence.clearHistory();
            if (limit > 0)
                for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
                    ended = end == null ? model.isEogToken(token) : end.has(token);
                    if (ended)
                        break;
                    if (tokens.push(token) >= limit)
                        break;
                }
            answers[index] = {id, text: model.detokenize(tokens, true), tokens, ended, ...more};
        }
    }
    await Promise.all(Array.from({length: sequences}, () => worker(context.getSequence())));
    return answers;
}

let output;
if (options.tokenize) {
    output = {
        add_bos: model.tokens.shouldPrependBosToken,
        texts: input.prompts.map(({id, text}) => ({id, tokens: model.tokenize(text, true)}))
    };
} else {
    const prompts = !options.chat ? input.prompts : input.prompts.map((prompt) => {
        const rendered = render(prompt);
        const tokens = chatTokens(rendered);
        return {id: prompt.id, tokens, rendered, prompt: tokens};
    });
    output = {answers: prompts.length === 0 ? [] : await answerAll(prompts)};
}
process.stdout.write(JSON.stringify(output) + "\n", () => process.exit(0));
