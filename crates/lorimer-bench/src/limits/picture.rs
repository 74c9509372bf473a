//! Γ/√ln L of every layer, as a picture.

use lorimer_train::run::chart::{self, Frame};
use plotters::prelude::*;

use super::report::{LayerReport, Report};

/// A line: its name, whether it is the base's, its points.
pub struct Line {
    name: String,
    plain: bool,
    points: Vec<(f64, f64)>,
}

/// The largest Γ/√ln L of each layer, a line a length and model.
pub fn lines(report: &Report) -> Vec<Line> {
    let of = |layers: &[LayerReport]| {
        let top = |layer: &LayerReport| layer.heads.iter().map(|h| h.gamma_over_root).fold(0.0, f64::max);
        layers.iter().map(|layer| (layer.layer as f64, top(layer))).collect()
    };
    let mut all = Vec::new();
    for own in &report.lengths {
        all.push(Line { name: format!("L = {}", own.length), plain: true, points: of(&own.base) });
        if let Some(adapted) = &own.adapted {
            let name = format!("L = {}, with the adapter", own.length);
            all.push(Line { name, plain: false, points: of(adapted) });
        }
    }
    all
}

/// An SVG of the lines: the base's thin, those with adapters thick, one colour a length.
pub fn draw(lines: &[Line]) -> Result<String, String> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let right = points().map(|p| p.0).fold(1.0, f64::max);
    let top = points().map(|p| p.1).filter(|y| y.is_finite()).fold(1e-6, f64::max) * 1.05;
    let frame = Frame {
        size: (900, 480),
        title: None,
        x: ("layer", 0.0..right),
        y: ("largest Γ/√ln L of its heads", 0.0..top),
        x_label: None,
        legend: true,
    };
    chart::svg(&frame, |chart| {
        let mut colour = 0;
        for (i, line) in lines.iter().enumerate() {
            colour += usize::from(line.plain && i > 0);
            let style = Palette99::pick(colour).stroke_width(if line.plain { 1 } else { 3 });
            chart::line(chart, &line.points, style, Some(&line.name))?;
        }
        Ok(())
    })
}
