//! Processor time of processes, from `/proc`.

use std::fs;

/// The µs that a process and all its threads have used, with those of its children that have ended.
pub fn of_process(process: u32) -> u64 {
    stat(process).map_or(0, |stat| stat.own + stat.ended_children)
}

/// The same with those of its children that run: PostgreSQL has a process for each connection.
pub fn of_family(parent: u32) -> u64 {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let children = processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(stat)
        .filter(|stat| stat.parent == parent);
    of_process(parent) + children.map(|stat| stat.own + stat.ended_children).sum::<u64>()
}

pub fn parent_of(process: u32) -> Option<u32> {
    stat(process).map(|stat| stat.parent)
}

struct Stat {
    parent: u32,
    own: u64,
    ended_children: u64,
}

fn stat(process: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before the parenthesis may contain anything.
    let fields: Vec<_> = text[text.rfind(')')? + 1..].split_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Stat {
        parent: fields.get(1)?.parse().ok()?,
        own: (ticks(11)? + ticks(12)?) * MICROS_PER_TICK,
        ended_children: (ticks(13)? + ticks(14)?) * MICROS_PER_TICK,
    })
}

/// Linux counts for programs in hundredths of a second, whatever it uses itself.
const MICROS_PER_TICK: u64 = 10_000;
