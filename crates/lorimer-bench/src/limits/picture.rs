//! Γ/√ln L of every layer, as a picture.

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
    let _ = plotters::style::register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    let say = |e: &dyn std::fmt::Display| e.to_string();
    let points = || lines.iter().flat_map(|line| &line.points);
    let right = points().map(|p| p.0).fold(1.0, f64::max);
    let top = points().map(|p| p.1).filter(|y| y.is_finite()).fold(1e-6, f64::max) * 1.05;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (900, 480)).into_drawing_area();
        area.fill(&WHITE).map_err(|e| say(&e))?;
        let mut chart = ChartBuilder::on(&area)
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..right, 0.0..top)
            .map_err(|e| say(&e))?;
        chart
            .configure_mesh()
            .x_desc("layer")
            .y_desc("largest Γ/√ln L of its heads")
            .label_style(("sans-serif", 15))
            .axis_desc_style(("sans-serif", 16))
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(|e| say(&e))?;
        let mut colour = 0;
        for (i, line) in lines.iter().enumerate() {
            colour += usize::from(line.plain && i > 0);
            let style = Palette99::pick(colour).stroke_width(if line.plain { 1 } else { 3 });
            chart
                .draw_series(LineSeries::new(line.points.iter().copied(), style))
                .map_err(|e| say(&e))?
                .label(line.name.clone())
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font(("sans-serif", 15))
            .draw()
            .map_err(|e| say(&e))?;
        area.present().map_err(|e| say(&e))?;
    }
    Ok(svg)
}
