//! Servers whose handlers write through the transaction of their attempt are killed, frozen and cut off from their
//! database, at named points and at random, and what they have done is compared with what clients were told.
//!
//! `scripts/torture` runs everything. With `--include-ignored`, as `scripts/test` calls it, a tenth is run.
//!
//! To `cargo test` this is one ignored test, named `torture`: words select it as they select tests elsewhere, and
//! options that are not its own are ignored.

#![expect(unreachable_pub, reason = "everything here is of one program, as in the modules it shares")]

#[path = "../support/mod.rs"]
mod support;

mod books;
mod client;
mod commits;
mod freezes;
mod journal;
mod kills;
mod lanes;
mod mutant;
mod payout;
mod phased;
mod phases;
mod report;
mod role;
mod storm;
mod trap;
mod upstream;

use std::{process::ExitCode, time::Instant};

use support::{required_env, server::Program};

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|argument| argument == SERVE) {
        role::serve().await;
        return ExitCode::SUCCESS;
    }
    let run = match Run::parse(&arguments) {
        Ok(Some(run)) => run,
        Ok(None) => {
            println!(
                "torture: ignored: run scripts/torture, or a tenth of it with scripts/test --test torture"
            );
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("torture: {error}");
            return ExitCode::from(2);
        }
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
            "upstream" => upstream::run(&run).await,
            "phases" => phases::run(&run).await,
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
    parts: Vec<&'static str>,
}

impl Run {
    /// `None` if nothing is to be done.
    fn parse(arguments: &[String]) -> Result<Option<Self>, String> {
        let mut run = Self { seed: u64::from(std::process::id()), full: false, parts: Vec::new() };
        let (mut included, mut words, mut arguments) = (false, Vec::new(), arguments.iter());
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--include-ignored" | "--ignored" => included = true,
                "--full" => run.full = true,
                "--seed" => {
                    let seed = arguments.next().and_then(|seed| seed.parse().ok());
                    run.seed = seed.ok_or("--seed takes a number")?;
                }
                "--part" => {
                    let name = arguments.next();
                    let part = PARTS.into_iter().find(|part| name.is_some_and(|name| name == part));
                    run.parts.push(part.ok_or_else(|| format!("--part takes one of {}", PARTS.join(", ")))?);
                }
                "--list" => return Ok(None),
                "--test-threads" | "--skip" | "--format" | "--color" => {
                    arguments.next();
                }
                option if option.starts_with('-') => {}
                word => words.push(word),
            }
        }
        let selected = words.is_empty() || words.iter().any(|word| "torture".contains(word));
        Ok((included && selected).then_some(run))
    }

    fn wants(&self, part: &str) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
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

const SERVE: &str = "--serve";
const PARTS: [&str; 7] = ["kills", "storm", "mutant", "commits", "freezes", "upstream", "phases"];
