"""PaCoRe: scheduling of parallel rollouts, the prefix tree of their KV pages, and the engine."""
