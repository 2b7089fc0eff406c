//! Dangling intents are looked up.

mod background;
mod lookups;
mod measured;
mod names;
mod operators;
mod purging;
mod terms;
