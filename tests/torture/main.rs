//! Servers whose handlers write through the transaction of their attempt are killed, frozen and cut off from their
//! database, at named points and at random, and what they have done is compared with what clients were told.
//!
//! `scripts/torture` runs everything. With `--include-ignored`, as `scripts/test` calls it, a tenth is run.

#![expect(unreachable_pub, reason = "everything here is of one program, as in the modules it shares")]

#[path = "../support/mod.rs"]
mod support;

mod books;
mod client;
mod commits;
mod freezes;
mod kills;
mod mutant;
mod report;
mod role;
mod storm;
mod trap;

use std::{process::ExitCode, time::Instant};

use support::{required_env, server::Program};

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|argument| argument == SERVE) {
        role::serve().await;
        return ExitCode::SUCCESS;
    }
    let Some(run) = Run::parse(&arguments) else {
        println!(
            "torture: needs PostgreSQL: run scripts/torture, or a tenth of it with scripts/test --test torture"
        );
        return ExitCode::SUCCESS;
    };
    required_env("TEST_POSTGRES_URL");
    println!("torture: seed {}, {}", run.seed, if run.full { "full size" } else { "a tenth" });
    for part in PARTS.iter().filter(|part| run.wants(part)) {
        let began = Instant::now();
        match *part {
            "kills" => kills::run(&run).await,
            "storm" => storm::run(&run).await,
            "mutant" => mutant::run(&run).await,
            "commits" => commits::run(&run).await,
            _ => freezes::run(&run).await,
        }
        println!("({part} took {} s)", began.elapsed().as_secs());
    }
    if report::all_held() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What to do.
#[derive(Clone, Debug)]
struct Run {
    seed: u64,
    full: bool,
    /// All if empty.
    parts: Vec<String>,
}

impl Run {
    /// `None` if servers are not to be expected. Words select parts by their names, as they select tests elsewhere.
    fn parse(arguments: &[String]) -> Option<Self> {
        let mut run = Self { seed: u64::from(std::process::id()), full: false, parts: Vec::new() };
        let (mut wanted, mut arguments) = (false, arguments.iter());
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--include-ignored" | "--ignored" => wanted = true,
                "--full" => run.full = true,
                "--seed" => {
                    let seed = arguments.next().and_then(|seed| seed.parse().ok());
                    run.seed = seed.expect("--seed takes a number");
                }
                "--part" => {
                    let part = arguments.next().filter(|part| PARTS.contains(&part.as_str()));
                    run.parts.push(part.unwrap_or_else(|| panic!("--part takes one of {PARTS:?}")).clone());
                }
                "--list" => return None,
                "--test-threads" | "--skip" | "--format" | "--color" => {
                    arguments.next();
                }
                option if option.starts_with('-') => {}
                word => run.parts.push(word.to_owned()),
            }
        }
        wanted.then_some(run)
    }

    fn wants(&self, part: &str) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|wanted| part.contains(wanted.as_str()))
    }

    /// How many of what there are `full` at full size.
    fn count(&self, full: usize) -> usize {
        if self.full { full } else { full.div_ceil(10) }
    }

    fn random(&self, part: &str) -> Random {
        part.bytes().fold(Random(self.seed), |random, byte| Random(random.0.rotate_left(8) ^ u64::from(byte)))
    }
}

/// This program as a server.
fn server() -> Program {
    Program::new(std::env::current_exe().expect("a program knows its own path"), &[SERVE])
}

/// Numbers that look random and are the same for the same seed (SplitMix64).
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

const SERVE: &str = "serve";
const PARTS: [&str; 5] = ["kills", "storm", "mutant", "commits", "freezes"];
