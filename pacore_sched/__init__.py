"""PaCoRe: rounds of parallel rollouts over shared prompts, the prefix tree of their KV pages, and the engine."""
