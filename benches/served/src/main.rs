//! The cost of the layer through sockets, beside its partners: handlers written by hand, the bare handler, and the crate
//! `idempotent`. `scripts/bench` builds and starts it, see there for the options.
//!
//! One program in three roles, each a process of its own: the driver starts servers and the load, round by round, and
//! writes the report; a server serves one application; the load sends requests over a number of connections and measures.

mod by_hand;
mod cpu;
mod database;
mod drive;
mod load;
mod options;
mod pairs;
mod plot;
mod report;
mod serve;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut runtime = match arguments.first() {
        // The load shares the cores with what it measures: one thread, no locks.
        Some(&"load") => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.enable_all().build()?;
    match arguments[..] {
        ["serve", role, place] => runtime.block_on(serve::serve(role, place)),
        ["load", plan] => runtime.block_on(load::run(serde_json::from_str(plan)?)),
        _ => runtime.block_on(drive::drive(options::Options::parse(&arguments)?)),
    }
}
