//! Stores: their contract, what each promises beyond it, and stores that break it.

#[path = "../support/mod.rs"]
mod support;

mod conformance;
mod connections;
mod groups;
mod groups_faults;
mod mutants;
mod own_database;
mod postgres;
mod requirements;
mod sqlite;
