"""The steps of a run with what each takes: work of tasks and of the driver, bytes, requests, memory."""

from collections.abc import Sequence

from curation.engine.exchange import buckets_for
from curation.ops.neighbour_kernels import MAX_NEIGHBOURS, code_width
from curation.ops.neighbours import PIECE_ROWS
from curation.ops.retrieval import BLOCK_PIECES, SPARE, SPARE_SHARE
from curation.ops.sketches import SKETCH_WORDS
from curation.planning import costs
from curation.planning.costs import Work
from curation.planning.estimates import SetEstimate
from curation.planning.numbers import PlannedStep, PlanNumbers, most_drawn
from curation.planning.words import encoder_words, filter_words, numbers, rule_words

_SLICES = 1024  # of the pool's vectors, in decontamination and retrieval
_JOIN_SHARE, _JOIN_ROWS_SHARE = 0.5, 0.75  # of execution.memory_gb for a run of the join, and of that for its rows


class Plan(PlanNumbers):
    """The steps of one run, each with what it takes."""

    def steps(self) -> list[PlannedStep]:
        c = self.config
        seeds, evaluations = self.seeds, self.evaluations
        steps = [self._embedding("embed/pool", self.pool, c.embed.encoders())]
        steps += [self._embedding(f"embed/seed-{name}", s, c.embed.encoders()[:1]) for name, s in seeds.items()]
        steps += [
            self._embedding(f"embed/evaluation-{name}", s, c.embed.encoders()[-1:]) for name, s in evaluations.items()
        ]
        steps += [self._exclusion(name) for name in self.run.excluded]
        steps += [self._filter(), self._heads(), self._cells(), self._join(), self._dedup()]
        steps += [*self._decontamination(), self._survivors(), self._clustering(), *self._retrieval()]
        if c.balance.is_wanted():
            steps.append(self._balance())
        return [*steps, self._decide(), self._shards(), self._report()]

    def notes(self) -> list[str]:
        """What differs from what was asked for, and what would be too much for the cluster."""
        found = []
        asked = [max(1, round(level * self.config.cluster.scale)) for level in self.config.cluster.levels]
        made = [shape.num_clusters for shape in self.levels]
        if len(asked) != len(made) or any(abs(a - b) > 0.01 * a for a, b in zip(asked, made, strict=True)):
            cause = f"the pool has {self.pool.images:,} images"
            found.append(f"cluster: {numbers(asked)} clusters were asked for, {numbers(made)} will be made: {cause}.")
        wanted = self.cluster.cores * self.config.execution.memory_gb
        if self.cluster.memory_gb and wanted > self.cluster.memory_gb:
            found.append(
                f"memory: {self.cluster.cores:,} tasks of execution.memory_gb={self.config.execution.memory_gb:g} may "
                f"want {wanted:,.0f} GB of a node, which has {self.cluster.memory_gb:,g} GB."
            )
        return found

    # --- steps, in their order ---------------------------------------------------------------------------------------

    def _embedding(self, name: str, images: SetEstimate, specs: Sequence[str]) -> PlannedStep:
        work = costs.decode_work(images.images, images.megapixels, [self.views[spec] for spec in specs])
        for spec in specs:
            work += costs.encode_work(images.images, self.encoder_costs[spec])
        row = costs.INDEX_BYTES + sum(2 * self.encoder_costs[spec].dim for spec in specs)
        return PlannedStep(
            name=name,
            what="decode once; "
            + "; ".join(encoder_words(spec, self.views[spec], self.encoder_costs[spec]) for spec in specs),
            files=f"{images.num_parts * (2 + len(specs)):,} files",
            bytes=images.images * row,
            work=work,
            images=images.images,
            tasks=images.num_parts,
            read=images.bytes,
            requests=images.num_parts * (4 + len(specs)),
            driver_bytes=1000.0 * images.num_parts,
            task_bytes=4 * sum(self.encoder_costs[spec].parameters for spec in specs)
            + images.images / max(images.num_parts, 1) * row,
        )

    def _exclusion(self, name: str) -> PlannedStep:
        """Both runs' images by bytes and by looks: about what heads does with one identity an image, twice."""
        run, ranges = self.run.excluded[name], self.num_ranges
        n = self.pool.images + run.num_images
        buckets, maps = buckets_for(600.0 * n, self.config.execution), ranges + -(-run.num_images // run.range_rows)
        return PlannedStep(
            name=f"exclude/{name}",
            what=f"images that {run.folder.url} keeps: the same bytes, or equal perceptual hashes",
            files=self._tables(ranges),
            bytes=8.0 * self.pool.images,
            work=Work(core_s=2 * n * costs.HEADS_S),
            images=n,
            tasks=max(maps, buckets),
            read=n * costs.INDEX_BYTES,
            moved=2 * n * costs.HEADS_WRITTEN,
            requests=costs.exchange_requests(maps, buckets) + costs.exchange_requests(buckets, ranges),
            task_bytes=self._range_bytes,
        )

    def _filter(self) -> PlannedStep:
        n, out = self.pool.images, self.pool.images * costs.FILTER_BYTES
        return PlannedStep(
            name="filter",
            what=filter_words(self.config.filters),
            files=self._tables(self.num_ranges),
            bytes=out,
            work=Work(core_s=n * costs.FILTER_S),
            images=n,
            tasks=self.num_ranges,
            read=n * costs.INDEX_BYTES + out,
            requests=2 * self.pool.num_parts + 3 * self.num_ranges,
            task_bytes=min(n, self.config.range_rows, 2**20) * costs.INDEX_ROW_BYTES,
        )

    def _heads(self) -> PlannedStep:
        n, ranges = self.pool.images, self.num_ranges
        buckets = buckets_for(120.0 * n, self.config.execution)
        return PlannedStep(
            name="heads",
            what="one for all images of the same perceptual hashes, or of the same bytes",
            files=self._tables(ranges),
            bytes=8.0 * n,
            work=Work(core_s=n * costs.HEADS_S),
            images=n,
            tasks=ranges,
            read=n * costs.HEADS_READ,
            moved=n * (costs.HEADS_WRITTEN - 8.0),
            requests=costs.exchange_requests(ranges, buckets) + costs.exchange_requests(buckets, ranges),
            task_bytes=self._range_bytes,
        )

    def _cells(self) -> PlannedStep:
        n, dim, k = self.pool.images, self._copies.dim, self.config.cells.kmeans
        cells, row = self.config.cells.num_cells(self.pool.images), 2 * dim + costs.SKETCH_AND_GID_BYTES
        training = min(n, k.points_per_cluster * cells)
        return PlannedStep(
            name="cells",
            what=f"{cells:,} cells of the copy-detection vectors, about {n / cells:,.0f} images each",
            files="vectors, sketches",
            bytes=n * row,
            work=costs.kmeans_work(training, cells, dim, k.num_iterations)
            + costs.product_work(n, cells, dim)
            + costs.grouping_work(n, dim),
            images=n,
            tasks=self.pool.num_parts,
            driver_s=costs.merging_s(cells, dim, k.num_iterations),
            read=n * 3 * 2 * dim + training * 2 * dim * (1 + k.num_iterations),
            moved=n * (2 * dim + 20 + 12) + training * 2 * dim,
            requests=4 * self.pool.num_parts + costs.grouping_requests(n, -(-n // 2**16), dim),
            driver_bytes=8.0 * cells * dim,
            task_bytes=self._grouping_bytes(dim) + 8.0 * cells * dim,
        )

    def join_rows(self) -> int:
        """Rows of a run of the join, as curation.ops.neighbours.run_rows has them."""
        cells = self.config.cells.num_cells(self.pool.images)
        probes = code_width(max(round(costs.PLANNED_SHARE * cells), 1), cells) + 8
        ways = 2 if self._copies.has_mirror else 1
        row = 2 * self._copies.dim + ways * (8 * SKETCH_WORDS + probes + 5) + 12 * MAX_NEIGHBOURS + 34
        return max(int(self.memory * _JOIN_SHARE * _JOIN_ROWS_SHARE) // row // PIECE_ROWS, 1) * PIECE_ROWS

    def _join(self) -> PlannedStep:
        n, c, dim = self.pool.images, self.config, self._copies.dim
        cells, row = c.cells.num_cells(self.pool.images), 2 * dim + costs.SKETCH_AND_GID_BYTES
        both_ways, rows = self._copies.has_mirror, min(self.join_rows(), max(n, 1))
        runs = -(-n // rows)
        read = n * row * (runs * costs.run_share(rows, max(n, 1), cells) + costs.CERTIFY_ROUNDS)
        work = costs.join_work(n, n, cells, dim, both_ways) + costs.certify_work(n, dim, both_ways)
        return PlannedStep(
            name="join",
            what=f"pairs of cosine >= {c.dedup.join().floor:g} at recall >= {c.dedup.target_recall:g}; each of "
            f"{runs:,} {'task' if runs == 1 else 'tasks'} reads the cells that {rows:,} images probe",
            files=f"{2 * -(-n // PIECE_ROWS) + 2:,} tables",
            bytes=n * costs.EDGE_BYTES,
            work=work,
            images=n,
            tasks=runs,
            read=read,
            requests=3 * -(-n // PIECE_ROWS) + read / 32e6,
            driver_bytes=4000.0 * -(-n // PIECE_ROWS) + 4.0 * cells * dim,
            task_bytes=min(_JOIN_SHARE * self.memory, 2.0 * rows * row + 2**28) + 4.0 * cells * dim,
        )

    def _dedup(self) -> PlannedStep:
        c, n, ranges, pieces = self.config.dedup, self.pool.images, self.num_ranges, -(-self.pool.images // PIECE_ROWS)
        buckets = buckets_for(4 * (n / 5 * 40 + n / 8 * 160), self.config.execution)
        cut = buckets_for(n / 5 * 40, self.config.execution)
        near = costs.perceptual_work(n / 2, n).core_s if n <= c.perceptual_rows else 0.0
        return PlannedStep(
            name="dedup",
            what=f"{f'PDQ within {c.perceptual_distance} of 256 bits; ' if near else ''}cosine >= "
            f"{c.similarity_threshold:g}; components over {c.max_component_size:,} re-split; kept by "
            f"{', '.join(c.representative)}",
            files=self._tables(ranges + 2),
            bytes=n * costs.DEDUP_BYTES,
            work=Work(core_s=n * costs.GROUPS_S),
            images=n,
            tasks=max(ranges, buckets),
            driver_s=n * costs.UNION_S + near,
            read=n * costs.GROUPS_READ,
            moved=n * (costs.GROUPS_WRITTEN - costs.DEDUP_BYTES),
            requests=costs.exchange_requests(pieces, cut)
            + costs.exchange_requests(cut + ranges, buckets)
            + costs.exchange_requests(buckets, ranges),
            driver_bytes=costs.driver_bytes(n) + min(n, self.config.range_rows) * 45.0,
            task_bytes=self._range_bytes,
        )

    def _decontamination(self) -> list[PlannedStep]:
        """Sets share one pass over the vectors and one over the hashes: the first pays for them."""
        c, n, dim = self.config.decontaminate, self.pool.images, self._copies.dim
        steps: list[PlannedStep] = []
        for name, images in self.evaluations.items():
            work = costs.join_work(images.images, n, 1, dim, self._copies.has_mirror, share=1.0)
            slices = min(_SLICES, -(-n // PIECE_ROWS))
            steps.append(
                PlannedStep(
                    name=f"decontaminate/{name}",
                    what=f"against {images.images:,} images: PDQ within {c.perceptual_distance} bits; cosine >= "
                    f"{c.similarity_threshold:g}",
                    files=self._tables(slices + self.num_ranges),
                    bytes=8.0 * n / 100,
                    work=work + costs.perceptual_work(images.images, n),
                    images=images.images,
                    tasks=slices,
                    read=0 if steps else n * (2 * dim + costs.SKETCH_AND_GID_BYTES + 70),
                    requests=2 * (slices + self.num_ranges) * (1 if steps else 2),
                    driver_bytes=70.0 * images.images,
                    task_bytes=min(self.memory / 2, images.images * 4.0 * dim + 2**28),
                )
            )
        return steps

    def _survivors(self) -> PlannedStep:
        what = "nothing: no --evaluation is given"
        if self.evaluations:
            mode = self.config.decontaminate.mode
            what = f"drops {'whole components' if mode == 'component' else 'the matches alone'}"
        n, ranges = self.pool.images, self.num_ranges
        buckets = buckets_for(n / 8 * 200, self.config.execution)
        return PlannedStep(
            name="survivors",
            what=what,
            files=self._tables(4 * ranges),
            bytes=8.0 * n,
            work=Work(core_s=n * costs.SURVIVORS_S),
            images=n,
            tasks=ranges,
            read=n * (costs.DEDUP_BYTES + 16),
            moved=n * 8.0,
            requests=costs.exchange_requests(_SLICES + ranges, ranges)
            + costs.exchange_requests(ranges, buckets)
            + costs.exchange_requests(buckets, ranges),
            task_bytes=self._range_bytes,
        )

    def _clustering(self) -> PlannedStep:
        n, k, dim = self.pool.images, self.config.cluster.kmeans, self._looks.dim
        work, items = Work(), n
        for shape in self.levels:
            work += costs.level_work(
                shape.num_rows, items, shape.num_clusters, shape.num_groups, shape.num_resamplings, dim,
                k.num_iterations,
            )  # fmt: skip
            items = shape.num_clusters
        levels = " / ".join(
            f"{shape.num_clusters:,}" + (f" (in {shape.num_groups:,} groups)" if shape.num_groups > 1 else "")
            for shape in self.levels
        )
        first, row = self.levels[0], 2 * dim + costs.SKETCH_AND_GID_BYTES
        # One process clusters the levels of a hierarchy that are not split; tasks do the others.
        whole = [shape.num_rows for shape in self.levels if shape.num_groups == 1 and len(self.levels) > 1]
        driver_s = costs.merging_s(first.num_clusters, dim, k.num_iterations) if len(self.levels) == 1 else 0.0
        at_once = min(first.num_clusters, 2**17) * dim * 8.0
        return PlannedStep(
            name="cluster",
            what=f"{levels} clusters of the distinct images; {k.num_iterations} iterations over {first.num_rows:,}",
            files=f"{3 * len(self.levels)} arrays, vectors",
            bytes=n * (4 + row) + 4.0 * dim * sum(shape.num_clusters for shape in self.levels),
            work=work + costs.grouping_work(n, dim),
            images=n,
            tasks=max(self.pool.num_parts, first.num_groups),
            driver_s=driver_s,
            read=n * 3 * 2 * dim + first.num_rows * 2 * dim * (1 + k.num_iterations),
            moved=n * (2 * dim + 20 + 12) + first.num_rows * 2 * dim,
            requests=4 * self.pool.num_parts + self.num_ranges + costs.grouping_requests(n, -(-n // 2**16), dim),
            driver_bytes=at_once,
            task_bytes=max(self._grouping_bytes(dim) + at_once, max(whole, default=0) * dim * 6.0),
        )

    def _retrieval(self) -> list[PlannedStep]:
        """Sets share two passes over the vectors: the first that draws by neighbours pays for them."""
        n, dim, slices = self.pool.images, self._looks.dim, min(_SLICES, -(-self.pool.images // PIECE_ROWS))
        steps, is_paid = [], False
        for name, (seed, _) in self.run.inputs.seeds.items():
            rule, asked = seed.rule, self.seeds[name].images
            drawn, work, read, requests = min(n, most_drawn(rule, asked)), Work(), 4.0 * n, 2.0 * self.num_ranges
            near = asked * (SPARE_SHARE * rule.k + SPARE) if rule.mode == "sample" else 0  # ranked by tasks
            if rule.mode == "sample":
                work = costs.retrieve_work(asked, n, self._retrieval_cells, dim) + Work(core_s=near * costs.RANKED_S)
                blocks = -(-asked // PIECE_ROWS)
                parts = blocks * BLOCK_PIECES  # each asks which of all images are left, a bit an image
                read = parts * n / 8 + (0.0 if is_paid else 2.0 * n * (2 * dim + costs.SKETCH_AND_GID_BYTES))
                requests = 2 * costs.exchange_requests(slices, blocks) + 1.0 * parts * self.num_ranges
                is_paid = True
            elif rule.mode == "cluster":
                work = costs.product_work(asked, self.levels[0].num_clusters, dim)
            steps.append(
                PlannedStep(
                    name=f"retrieve/{name}",
                    what=rule_words(rule, drawn),
                    files="tables",
                    bytes=36.0 * drawn + 20.0 * near,
                    work=work,
                    images=asked,
                    tasks=slices,
                    read=read,
                    moved=36.0 * drawn,
                    requests=requests,
                    driver_bytes=8.0 * asked + 36.0 * min(drawn, max(self.config.range_rows, rule.max_images)),
                    task_bytes=self.memory / 2 if asked > PIECE_ROWS else 4.0 * asked * dim + 2**28,
                )
            )
        return steps

    def _balance(self) -> PlannedStep:
        n, drawn = self.pool.images, self.config.balance.target(self.pool.images)
        return PlannedStep(
            name="balance",
            what=f"{drawn:,} images, evenly over {self.levels[-1].num_clusters:,} concepts and all below them",
            files=self._tables(self.num_ranges),
            bytes=16.0 * drawn,
            work=Work(core_s=n * costs.BALANCE_S),
            images=n,
            tasks=self.num_ranges,
            read=12.0 * n,
            moved=16.0 * drawn,
            requests=2 * costs.exchange_requests(self.num_ranges, self.num_ranges),
            driver_bytes=24.0 * self.levels[0].num_clusters,
            task_bytes=self._range_bytes,
        )

    def _decide(self) -> PlannedStep:
        n, ranges = self.pool.images, self.num_ranges
        return PlannedStep(
            name="decide",
            what=f"one row for each image, in {ranges:,} {'range' if ranges == 1 else 'ranges'}",
            files=self._tables(ranges),
            bytes=n * costs.DECISION_BYTES,
            work=Work(core_s=n * costs.DECIDE_S),
            images=n,
            tasks=ranges,
            read=n * (costs.INDEX_BYTES / 2 + 2 * (costs.DEDUP_BYTES + 16)),
            moved=30.0 * n,
            requests=2 * self.pool.num_parts + costs.exchange_requests(ranges, ranges) * 2,
            task_bytes=self._range_bytes / 2 + min(n, 2**20) * costs.INDEX_ROW_BYTES,
        )

    def _shards(self) -> PlannedStep:
        c = self.config.shard
        as_is = [self.seeds[name] for name, (seed, _) in self.run.inputs.seeds.items() if seed.include_as_is]
        images = self.num_kept + sum(s.images for s in as_is)
        size = sum(s.images * (s.image_bytes + costs.TAR_OVERHEAD_BYTES) for s in as_is)
        size += self.num_kept * (self.pool.image_bytes + costs.TAR_OVERHEAD_BYTES)
        tars = max(-(-images // c.max_images), -(-int(size) // int(c.max_mb * 1e6)), 1)
        one, many = ("tar", "tars") if c.format == "webdataset" else ("Parquet file", "Parquet files")
        return PlannedStep(
            name="shards",
            what=f"original bytes of at most {images:,} images, shuffled; up to {c.max_images:,} or {c.max_mb:g} MB a "
            f"{one}",
            files=f"{tars:,} {many}",
            bytes=size,
            work=Work(core_s=size / costs.SHARD_BYTES_PER_S + images * costs.SHARD_PLAN_S),
            images=images,
            tasks=tars,
            driver_s=images * costs.SHARD_PLAN_DRIVER_S,
            read=size + self.pool.images * costs.INDEX_BYTES + images * 2 * costs.INDEX_BYTES,
            moved=images * 2 * costs.INDEX_BYTES,
            requests=images + 3 * tars + 2 * self.pool.num_parts
            + costs.exchange_requests(self.num_ranges, -(-images // 250_000)) * 2,
            driver_bytes=1000.0 * tars,
            task_bytes=2.0 * c.max_mb * 1e6,
        )  # fmt: skip

    def _report(self) -> PlannedStep:
        n = self.pool.images
        return PlannedStep(
            name="report",
            what="report.html, report.json, decisions.parquet",
            files="3 files" if self.num_ranges <= 1 else f"{2 + self.num_ranges:,} files",
            bytes=n * costs.DECISION_BYTES,
            work=Work(core_s=n * costs.REPORT_S),
            images=n,
            tasks=self.num_ranges,
            read=n * costs.DECISION_BYTES,
            requests=4 * self.num_ranges,
            task_bytes=min(n, self.config.range_rows) * costs.DECISION_BYTES + min(n, 2**20) * costs.INDEX_ROW_BYTES,
        )
