//! Transactions of handlers, on every store that has them.

#[path = "../support/mod.rs"]
mod support;

mod bank;
mod duplicates;
mod ended;
mod extraction;
mod kept;
mod late;
mod late_begins;
mod not_results;
mod postgres;
mod postgres_faults;
mod refused;
mod results;
mod rolled_back;
mod second_run;
mod single;
mod single_and_claimed;
mod spoilt;
mod sqlite;
mod timeouts;
