//! Charts: one frame, grid and legend for the pictures of runs and of measurements, as SVG and as PNG.

use std::fmt::Display;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

/// A chart that series are drawn on.
pub type Chart<'c, B> = ChartContext<'c, B, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// What stands around the series.
pub struct Frame<'a> {
    /// Width and height in pixels.
    pub size: (u32, u32),
    /// Above the chart.
    pub title: Option<&'a str>,
    /// What goes to the right, and from where to where.
    pub x: (&'a str, Range<f64>),
    /// What goes up, and from where to where.
    pub y: (&'a str, Range<f64>),
    /// How a number below the chart is written; None: plainly.
    pub x_label: Option<&'a dyn Fn(&f64) -> String>,
    /// Whether the names of the series are listed.
    pub legend: bool,
}

/// The chart as SVG; `series` draws on it.
///
/// # Errors
///
/// Fails with what the drawing library says, if it cannot draw.
pub fn svg(
    frame: &Frame<'_>,
    series: impl for<'c> FnOnce(&mut Chart<'c, SVGBackend<'c>>) -> Result<(), String>,
) -> Result<String, String> {
    let mut svg = String::new();
    draw(SVGBackend::with_string(&mut svg, frame.size).into_drawing_area(), frame, series)?;
    Ok(svg)
}

/// The chart as PNG; `series` draws on it.
///
/// # Errors
///
/// Fails with what the drawing library or the encoder says, if it cannot draw.
pub fn png(
    frame: &Frame<'_>,
    series: impl for<'c> FnOnce(&mut Chart<'c, BitMapBackend<'c>>) -> Result<(), String>,
) -> Result<Vec<u8>, String> {
    let (width, height) = frame.size;
    let mut pixels = vec![0u8; (width * height * 3) as usize];
    draw(BitMapBackend::with_buffer(&mut pixels, frame.size).into_drawing_area(), frame, series)?;
    let mut png = Vec::new();
    let mut encoder = png::Encoder::new(&mut png, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().and_then(|mut header| header.write_image_data(&pixels)).map_err(message)?;
    Ok(png)
}

/// A line through points; with a name it stands in the legend.
///
/// # Errors
///
/// Fails with what the drawing library says, if it cannot draw.
pub fn line<'c, B: DrawingBackend + 'c>(
    chart: &mut Chart<'c, B>,
    points: &[(f64, f64)],
    style: ShapeStyle,
    name: Option<&str>,
) -> Result<(), String> {
    let drawn = chart.draw_series(LineSeries::new(points.iter().copied(), style)).map_err(message)?;
    if let Some(name) = name {
        drawn.label(name).legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], style));
    }
    Ok(())
}

/// What the drawing library says.
pub fn message(error: impl Display) -> String {
    error.to_string()
}

fn draw<'c, B: DrawingBackend + 'c>(
    area: DrawingArea<B, Shift>,
    frame: &Frame<'_>,
    series: impl FnOnce(&mut Chart<'c, B>) -> Result<(), String>,
) -> Result<(), String> {
    // A font of our own, so that the pictures need none from the system.
    let _ = plotters::style::register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    area.fill(&WHITE).map_err(message)?;
    let mut builder = ChartBuilder::on(&area);
    if let Some(title) = frame.title {
        builder.caption(title, ("sans-serif", 22));
    }
    let (x, y) = (frame.x.1.clone(), frame.y.1.clone());
    builder.margin(14).x_label_area_size(46).y_label_area_size(60);
    let mut chart: Chart<'c, B> = builder.build_cartesian_2d(x, y).map_err(message)?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(frame.x.0).y_desc(frame.y.0).label_style(("sans-serif", 15)).axis_desc_style(("sans-serif", 16));
    if let Some(label) = frame.x_label {
        mesh.x_label_formatter(label);
    }
    mesh.light_line_style(TRANSPARENT).draw().map_err(message)?;
    series(&mut chart)?;
    if frame.legend {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font(("sans-serif", 15))
            .draw()
            .map_err(message)?;
    }
    area.present().map_err(message)
}
