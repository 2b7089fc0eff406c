//! The figures as tables in Markdown.

use crate::Measured;

pub(crate) fn print(rows: i64, all: &[Measured]) {
    println!("{rows} rows; own size, size of all indexes; costs as ratios to the first line's copy\n");
    println!(
        "| candidate | own size | all indexes | insert: clients, server | finalize: clients, server | HOT | WAL a pair |"
    );
    println!("|---|---|---|---|---|---|---|");
    for Measured { candidate, fresh, costs, hot, .. } in all {
        let ([insert, finalize], [insert_in, finalize_in]) = (costs.client, costs.server);
        println!(
            "| {} | {} | {} | {insert:.2}, {insert_in:.2} | {finalize:.2}, {finalize_in:.2} | {} | {:.0} B |",
            candidate.name,
            size(fresh.own),
            size(fresh.all),
            hot.map_or("no updates".to_owned(), |hot| format!("{:.1} %", hot * 100.0)),
            costs.wal
        );
    }
    print_times(all);
    print_purges(all);
}

fn print_times(all: &[Measured]) {
    println!(
        "\n| candidate | cold | warm | after churn: first, again | sweep | after purge | after `VACUUM` | beside an old snapshot | own size after churn | all indexes | `VACUUM` |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for figures in all {
        let ((first, again), purge) = (figures.after_churn, &figures.purge);
        let times = [figures.cold, figures.warm].map(time).join(" | ");
        println!(
            "| {} | {times} | {}, {} | {} | {} | {} | {} | {} | {} | {} |",
            figures.candidate.name,
            time(first),
            time(again),
            time(figures.swept),
            time(purge.found),
            time(purge.vacuumed_found),
            time(purge.refilled_found),
            size(figures.churned.own),
            size(figures.churned.all),
            time(purge.vacuum)
        );
    }
}

fn print_purges(all: &[Measured]) {
    println!(
        "\n| purge by age | size | batch of 1,000 | nothing due: before, after `VACUUM` | refilled: batch, nothing due |"
    );
    println!("|---|---|---|---|---|");
    for Measured { candidate, fresh, purge, .. } in all.iter().filter(|figures| figures.candidate.purge) {
        println!(
            "| {} | {} | {} | {}, {} | {}, {} |",
            candidate.name,
            size(fresh.own),
            time(purge.batch),
            time(purge.idle),
            time(purge.vacuumed_idle),
            time(purge.refilled_batch),
            time(purge.refilled_idle)
        );
    }
}

fn size(bytes: f64) -> String {
    if bytes < 1e6 { format!("{:.0} kB", bytes / 1024.0) } else { format!("{:.1} MB", bytes / 1048576.0) }
}

fn time(seconds: f64) -> String {
    match seconds {
        0.0 => String::new(),
        ..0.01 => format!("{:.1} ms", seconds * 1e3),
        ..1.0 => format!("{:.0} ms", seconds * 1e3),
        _ => format!("{seconds:.1} s"),
    }
}
