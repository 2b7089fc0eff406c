//! Plots of the pairs that were measured at several numbers of connections.

use std::fmt::Write;

use crate::{
    drive::Point,
    load::Sample,
    pairs::{Figure, Pair},
};

const WIDTH: f64 = 210.0;
const HEIGHT: f64 = 130.0;
const LEFT: f64 = 46.0;
const TOP: f64 = 44.0;
const ROW: f64 = 210.0;
const COLUMN: f64 = 270.0;

type Panel = (&'static str, fn(&Sample) -> f64);
const PANELS: [Panel; 4] = [
    ("requests a second", |sample| sample.throughput),
    ("p50, ms", |sample| sample.p50 / 1e3),
    ("p99, ms", |sample| sample.p99 / 1e3),
    ("CPU of server and database, µs", |sample| Figure::Cpu.of(sample)),
];

/// One row of panels for each pair. Blue is the layer, orange its partner.
pub fn svg(measured: &[(Pair, Vec<Point>)]) -> String {
    let curves: Vec<_> = measured.iter().filter(|(_, points)| points.len() > 2).collect();
    let (width, height) = (COLUMN * PANELS.len() as f64, ROW * curves.len() as f64);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" font-family=\"sans-serif\" font-size=\"11\" \
         fill=\"currentColor\" style=\"max-width:100%;height:auto\" xmlns=\"http://www.w3.org/2000/svg\">\n\
         <title>Figures of the layer and its partners by the number of connections</title>\n"
    );
    for (row, (pair, points)) in curves.iter().enumerate() {
        let top = row as f64 * ROW;
        let _ = writeln!(
            svg,
            "<text x=\"0\" y=\"{}\" font-size=\"13\" font-weight=\"bold\">{}: <tspan fill=\"{}\">{}</tspan> / \
             <tspan fill=\"{}\">{}</tspan></text>",
            top + 14.0,
            plain(&pair.work),
            COLOURS[0],
            plain(pair.subject.label),
            COLOURS[1],
            plain(pair.partner.label),
        );
        for (column, panel) in PANELS.iter().enumerate() {
            draw(&mut svg, column as f64 * COLUMN + LEFT, top + TOP, panel, points);
        }
    }
    svg + "</svg>\n"
}

/// One panel with its upper left corner at (x, y); both axes are logarithmic.
fn draw(svg: &mut String, x: f64, y: f64, (title, figure): &Panel, points: &[Point]) {
    let values = [0, 1].map(|side| points.iter().map(|point| point.median(side, figure)).collect::<Vec<_>>());
    let all = || values.iter().flatten().filter(|value| **value > 0.0);
    let least = all().copied().fold(f64::INFINITY, f64::min).log10().floor();
    let greatest = all().copied().fold(0.0, f64::max).log10().ceil().max(least + 1.0);
    let across = |index: usize| x + WIDTH * index as f64 / (points.len() - 1) as f64;
    let down = |value: f64| y + HEIGHT * (greatest - value.max(1e-9).log10()) / (greatest - least);
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{}\">{title}</text>", y - 8.0);
    for exponent in least as i32..=greatest as i32 {
        let (at, value) = (down(10f64.powi(exponent)), 10f64.powi(exponent));
        let _ = writeln!(
            svg,
            "<path d=\"M{x} {at:.1}h{WIDTH}\" stroke=\"currentColor\" stroke-opacity=\".2\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>",
            x - 5.0,
            at + 4.0,
        );
    }
    for (index, point) in points.iter().enumerate() {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            across(index),
            y + HEIGHT + 15.0,
            point.connections,
        );
    }
    for (values, colour) in values.iter().zip(COLOURS) {
        let places: Vec<_> =
            values.iter().enumerate().map(|(index, value)| (across(index), down(*value))).collect();
        let line: Vec<_> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            line.join(" "),
        );
        for (x, y) in places {
            let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
        }
    }
}

fn plain(text: &str) -> String {
    text.replace('`', "")
}

/// Of the layer and of its partner; readable on light and on dark pages, also by the colour-blind.
const COLOURS: [&str; 2] = ["#3b82c4", "#d9822b"];
