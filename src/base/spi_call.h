/*-------------------------------------------------------------------------
 *
 * spi_call.h
 *	  Bookkeeping statements: prepared once, run with our rights.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_SPI_CALL_H
#define REDRIVE_SPI_CALL_H

#include "commands/trigger.h"
#include "executor/spi.h"

#define REDRIVE_MAX_ARGS 32

/* One statement, kept in a static variable next to its caller. */
typedef struct RedriveSql
{
	const char *text;
	int			nargs;
	Oid			argtypes[REDRIVE_MAX_ARGS];
	bool		once;			/* the plan goes with the connection */
	SPIPlanPtr	plan;			/* made at first use, lives as long as the
								 * backend */
	bool		lookups;		/* joins look single rows up, and what comes
								 * first is the first of an index, whatever is
								 * estimated */
} RedriveSql;

/* A user's query that is being read, with the caller's rights. */
typedef struct RedriveQuery
{
	Portal		portal;
	SPIPlanPtr	plan;
	SPITupleTable *rows;		/* of the last fetch */
} RedriveQuery;

/*
 * A statement on the partitions of one part: "@" in its text stands for the
 * number.  Naming the partition spares planning for, locking and routing
 * through all of them.
 */
#define REDRIVE_MAX_PARTS 32

typedef struct RedrivePartSql
{
	const char *text;
	int			nargs;
	Oid			argtypes[REDRIVE_MAX_ARGS];
	RedriveSql	parts[REDRIVE_MAX_PARTS];
} RedrivePartSql;

extern Oid	redrive_owner(void);
extern bool redrive_version_fits(int elevel);
extern uint64 redrive_sql(RedriveSql *sql, Datum *values, const char *nulls);
extern uint64 redrive_part_sql(RedrivePartSql *sql, int part, Datum *values, const char *nulls);
extern void redrive_sql_one_row(RedriveSql *sql, Datum *values, const char *nulls);
extern Datum redrive_column(int row, const char *name, bool *isnull);
extern int64 redrive_int64(int row, const char *name);
extern TimestampTz redrive_time(int row, const char *name);
extern bool redrive_bool(int row, const char *name);
extern char *redrive_text(int row, const char *name, MemoryContext cxt);
extern void redrive_free_rows(void);
extern Datum redrive_array(Oid type, int n, Datum *values, bool *nulls);
extern void redrive_trigger_rows(TriggerData *data);
extern RedriveQuery *redrive_query_open(const char *text, int ncolumns, Oid *types, const char *expected);
extern int	redrive_query_fetch(RedriveQuery *query, int rows);
extern Datum redrive_query_column(RedriveQuery *query, int row, int column, bool *isnull);
extern void redrive_query_close(RedriveQuery *query);

#endif							/* REDRIVE_SPI_CALL_H */
