//! Stores: their contract, what each promises beyond it, and stores that break it.

#[path = "../support/mod.rs"]
mod support;

mod conformance;
mod mutants;
mod postgres;
mod sqlite;
