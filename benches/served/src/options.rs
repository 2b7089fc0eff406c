//! The options of a run.

use crate::Result;

pub struct Options {
    /// Names of pairs or goals; empty means all.
    pub only: Vec<String>,
    pub seconds: f64,
    pub warm_up: f64,
    pub rounds: usize,
    /// Connections, instead of those that each pair names.
    pub connections: Option<Vec<usize>>,
    /// Sizes of large tables, in millions of records.
    pub millions: Vec<f64>,
    /// Every pair, but at the connections of its goals only.
    pub quick: bool,
    /// Writes the report into the guide instead of printing it only.
    pub into_guide: bool,
}

impl Options {
    pub fn parse(arguments: &[&str]) -> Result<Self> {
        let mut options = Self {
            only: Vec::new(),
            seconds: 2.0,
            warm_up: 0.5,
            rounds: 5,
            connections: None,
            millions: vec![1.0, 10.0],
            quick: false,
            // A part or a smoke run must not take the place of the whole table.
            into_guide: arguments.is_empty(),
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value\n{USAGE}"));
            match *argument {
                "--quick" => {
                    options = Self {
                        quick: true,
                        rounds: 1,
                        seconds: 0.5,
                        warm_up: 0.3,
                        millions: vec![0.1],
                        ..options
                    };
                }
                "--write" => options.into_guide = true,
                "--only" => options.only = value()?.split(',').map(str::to_lowercase).collect(),
                "--seconds" => options.seconds = value()?.parse()?,
                "--rounds" => options.rounds = value()?.parse()?,
                "--connections" => options.connections = Some(numbers(value()?)?),
                "--million" => options.millions = numbers(value()?)?,
                _ => return Err(format!("unknown option {argument}\n{USAGE}").into()),
            }
        }
        if options.rounds == 0 || options.seconds < 0.1 {
            return Err("at least one round of 0.1 seconds".into());
        }
        Ok(options)
    }
}

fn numbers<T: std::str::FromStr>(list: &str) -> Result<Vec<T>, T::Err> {
    list.split(',').map(str::parse).collect()
}

const USAGE: &str = "\
usage: scripts/bench [--quick] [--only P1,P4] [--seconds N] [--rounds N] [--connections 1,64] [--million 1,10] [--write]";
