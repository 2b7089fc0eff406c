//! The report: tables of the goals, of the ratios and of the figures.

use std::{collections::BTreeMap, fmt::Write, fs, time::Duration};

use crate::{
    Result,
    drive::{Point, Spread},
    load::Sample,
    pairs::{Bound, Figure, Pair},
    plot,
};

/// The circumstances of a run.
pub struct Setting {
    pub postgres: String,
    pub redis: Option<String>,
    /// µs of a commit while nobody else writes.
    pub commit: f64,
    /// The same where flushes take a millisecond longer.
    pub slow_commit: f64,
    pub rounds: usize,
    pub seconds: f64,
    pub took: Duration,
}

type Measured = [(Pair, Vec<Point>)];

/// Prints the tables, and puts them and the plots into the guide if asked.
pub fn write(measured: &Measured, setting: &Setting, into_guide: bool) -> Result<()> {
    let tables = [circumstances(setting), goals(measured), ratios(measured), figures(measured)].join("\n");
    println!("{tables}");
    if into_guide {
        // The plots follow it in the guide.
        fs::write("src/guide/cost_tables.md", tables + "\n# Plots\n\n")?;
        fs::write("src/guide/cost_plots.svg", plot::svg(measured))?;
    }
    Ok(())
}

fn circumstances(setting: &Setting) -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let redis = setting.redis.as_ref().map_or(String::new(), |version| format!(", Redis {version}"));
    let version = |name| format!("{name} {}", locked_version(name));
    format!(
        "{} cores, shared by load, server and database; {}{redis}; {}. A commit takes {:.1} ms while \
         nobody else writes, {:.1} ms where a flush takes 1 ms more. {} rounds of {} s for each side, in turn; \
         the whole run took {:.0} min.\n",
        cores,
        setting.postgres,
        ["axum", "hyper", "tokio", "sqlx", "idempotent"].map(version).join(", "),
        setting.commit / 1e3,
        setting.slow_commit / 1e3,
        setting.rounds,
        setting.seconds,
        setting.took.as_secs_f64() / 60.0,
    )
}

fn locked_version(name: &str) -> &'static str {
    let entry = include_str!("../Cargo.lock").split(&format!("\nname = \"{name}\"\nversion = \"")).nth(1);
    entry.and_then(|entry| entry.split('"').next()).unwrap_or("?")
}

fn goals(measured: &Measured) -> String {
    let mut rows = BTreeMap::new();
    for (index, (pair, points)) in measured.iter().enumerate() {
        for (row, goal) in pair.goals.iter().enumerate() {
            for point in points.iter().filter(|point| goal.connections.contains(&point.connections)) {
                // P10 comes after P9.
                let number = goal.name.trim_matches(char::is_alphabetic).parse().unwrap_or(0);
                let place = (number, goal.name, index, row, point.connections);
                let Spread { median, least, greatest } = point.ratio(goal.figure);
                let text = format!(
                    "| {} | {} | {} | {} | {} | {} | {} | {}–{} | {} |\n",
                    goal.name,
                    pair.work,
                    pair.partner.label,
                    point.connections,
                    goal.figure.name(),
                    match goal.bound {
                        Bound::AtLeast(bound) => format!("≥ {bound}"),
                        Bound::AtMost(bound) => format!("≤ {bound}"),
                    },
                    short(median),
                    short(least),
                    short(greatest),
                    if goal.bound.holds(median) { "reached" } else { "**missed**" },
                );
                rows.insert(place, text);
            }
        }
    }
    let head = "# Goals\n\n| | work | partner | connections | figure | goal | measured | spread | |\n\
                |---|---|---|---|---|---|---|---|---|\n";
    head.to_owned() + &rows.into_values().collect::<String>()
}

fn ratios(measured: &Measured) -> String {
    let mut text = "# Ratios\n\n| work | to | connections | throughput | p50 | p99 | CPU |\n\
                    |---|---|---|---|---|---|---|\n"
        .to_owned();
    for (pair, points) in measured {
        for point in points {
            let [throughput, p50, p99, cpu] =
                [Figure::Throughput, Figure::P50, Figure::P99, Figure::Cpu].map(|figure| point.ratio(figure));
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} ({}–{}) | {} | {} | {} |",
                pair.work,
                pair.partner.label,
                point.connections,
                short(throughput.median),
                short(throughput.least),
                short(throughput.greatest),
                short(p50.median),
                short(p99.median),
                short(cpu.median),
            );
        }
    }
    text
}

fn figures(measured: &Measured) -> String {
    let mut text = "# Figures\n\n| work | application | connections | requests a second | p50, ms | p99, ms | server, µs \
                    | database, µs | load, µs | failed |\n|---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for (pair, points) in measured {
        for point in points {
            for (side, label) in [pair.subject.label, pair.partner.label].iter().enumerate() {
                let median = |figure: fn(&Sample) -> f64| point.median(side, figure);
                let _ = writeln!(
                    text,
                    "| {} | {label} | {} | {:.0} | {:.2} | {:.2} | {:.0} | {:.0} | {:.0} | {} |",
                    pair.work,
                    point.connections,
                    median(|sample| sample.throughput),
                    median(|sample| sample.p50) / 1e3,
                    median(|sample| sample.p99) / 1e3,
                    median(|sample| sample.server_cpu),
                    median(|sample| sample.database_cpu),
                    median(|sample| sample.load_cpu),
                    point.failed(side),
                );
            }
        }
    }
    text
}

/// Two significant figures, three from 10.
fn short(ratio: f64) -> String {
    if ratio >= 10.0 || ratio == 0.0 { format!("{ratio:.0}") } else { format!("{ratio:.2}") }
}
