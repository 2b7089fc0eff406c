//! Dangling intents are looked up.

mod background;
mod lookups;
mod operators;
mod purging;
