//! Dangling intents are looked up.

mod background;
mod lookups;
mod measured;
mod operators;
mod purging;
